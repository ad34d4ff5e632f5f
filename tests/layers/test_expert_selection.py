"""Which parameters are experts, which linear layers are routers, and which patterns name them."""

import pytest
import torch
from torch import nn

from lightning_qlora import QLoRALinear, convert
from lightning_qlora.layers.experts import expert_stacks
from tests.layers.test_experts import MODELS, made, qwen3_moe

transformers = pytest.importorskip("transformers", minversion="5")


def stacks_of(model):
    return [name for name, *_ in expert_stacks(model)]


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_all_linear_converts_experts_of_every_layout(build):
    model = made(build)
    expected = {
        name
        for name, p in model.named_parameters()
        if (p.ndim == 3 and "conv" not in name) or name.endswith((".w1", ".v1", ".w2"))
    }
    layouts = {name: tuple(model.get_parameter(name).shape) for name in expected}
    convert(model, r=2)
    assert set(stacks_of(model)) == expected and expected
    for name, _, _, stack in expert_stacks(model):
        assert stack.weight_shape == layouts[name] and stack.r == 2
    assert not any(type(part).__name__.endswith("Router") and isinstance(part, QLoRALinear) for part in model.modules())


def test_the_layout_of_one_expert_follows_the_width_of_the_model():
    transposed = {}
    for name in ("qwen3_moe", "gpt_oss", "llama4", "dbrx"):
        model = made(MODELS[name])
        convert(model, r=2)
        transposed |= {f"{name}.{key}": stack._transposed for _, _, key, stack in expert_stacks(model)}
    assert transposed == {
        "qwen3_moe.gate_up_proj": False, "qwen3_moe.down_proj": False, "gpt_oss.gate_up_proj": True,
        "gpt_oss.down_proj": True, "llama4.gate_up_proj": True, "llama4.down_proj": True, "dbrx.w1": False,
        "dbrx.v1": False, "dbrx.w2": True,
    }  # fmt: skip


SMALL_TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
ROUTERS = {
    "longcat": lambda: transformers.LongcatFlashForCausalLM(
        transformers.LongcatFlashConfig(
            **SMALL_TEXT, num_layers=1, ffn_hidden_size=64, expert_ffn_hidden_size=32, n_routed_experts=14,
            zero_expert_num=2, moe_topk=2, q_lora_rank=24, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=16,
            v_head_dim=16,
        )
    ),
    "nllb_moe": lambda: transformers.NllbMoeForConditionalGeneration(
        transformers.NllbMoeConfig(
            d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_experts=16,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_sparse_step=2, decoder_sparse_step=2,
            vocab_size=96,
        )
    ),
    "switch": lambda: transformers.SwitchTransformersForConditionalGeneration(
        transformers.SwitchTransformersConfig(
            d_model=64, d_ff=64, d_kv=32, num_heads=2, num_layers=2, num_sparse_encoder_layers=1, num_experts=16,
            num_decoder_layers=2, num_sparse_decoder_layers=1, vocab_size=96,
        )
    ),
    "hunyuan": lambda: transformers.HunYuanMoEV1ForCausalLM(
        transformers.HunYuanMoEV1Config(
            **SMALL_TEXT, num_key_value_heads=2, intermediate_size=64, num_experts=16, moe_topk=[2, 2], head_dim=16
        )
    ),
    "afmoe": lambda: transformers.AfmoeForCausalLM(
        transformers.AfmoeConfig(
            **SMALL_TEXT, num_key_value_heads=2, intermediate_size=64, moe_intermediate_size=32, num_experts=16,
            num_experts_per_tok=2, num_dense_layers=1, head_dim=16,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_of_any_name_stay_dense(name):
    with torch.device("meta"):
        model = ROUTERS[name]()
    model.to_empty(device="cpu")
    outputs = {name: layer.out_features for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    routers = {name for name, number in outputs.items() if number == 16}
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    report = convert(model, r=2)
    assert routers and all("router of experts" in report.skipped[router] for router in routers)


def test_experts_of_a_module_list_are_linear_layers():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.choose, self.experts = nn.Linear(64, 8), nn.ModuleList([nn.Linear(64, 64) for _ in range(8)])
            self.projection = nn.Linear(64, 64)

    report = convert(Mixture(), r=2)
    assert "router" in report.skipped["choose"]
    assert report.converted == [*(f"experts.{i}" for i in range(8)), "projection"]


@pytest.mark.parametrize(
    ("targets", "keys"),
    [
        (["gate_up_proj"], {"gate_up_proj"}),
        (["mlp.experts.down_proj", "q_proj"], {"down_proj"}),
        (["experts"], {"gate_up_proj", "down_proj"}),
        (r".*experts\.gate_up_proj", {"gate_up_proj"}),
    ],
)
def test_patterns_name_the_parameter(targets, keys):
    model = made(qwen3_moe)
    report = convert(model, r=2, target_modules=targets)
    assert {name.rpartition(".")[2] for name in stacks_of(model)} == keys
    left = {"gate_up_proj", "down_proj"} - keys
    assert all(report.skipped[f"model.layers.0.mlp.experts.{key}"] == "not in target_modules" for key in left)


def test_exclude_rank_and_modules_to_save():
    model = made(qwen3_moe)
    report = convert(
        model, r=2, exclude_modules=["layers.0.mlp.experts.down_proj"], rank_pattern={"experts.gate_up_proj": 4},
        modules_to_save=["layers.1.mlp.experts"],
    )  # fmt: skip
    assert stacks_of(model) == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == "in exclude_modules"
    assert next(iter(expert_stacks(model)))[3].r == 4
    assert model.model.layers[1].mlp.experts.down_proj.requires_grad
    assert not model.model.layers[0].mlp.experts.down_proj.requires_grad


def test_experts_smaller_than_an_adapter_stay_dense_and_frozen():
    model = made(qwen3_moe)
    report = convert(model, r=24)
    reason = report.skipped["model.layers.0.mlp.experts.down_proj"]
    assert "rank 24" in reason and "64x32" in reason
    assert not model.model.layers[0].mlp.experts.down_proj.requires_grad


def test_tied_experts_stay_dense():
    model = made(qwen3_moe)
    model.model.layers[1].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj
    report = convert(model, r=2)
    assert "tied to" in report.skipped["model.layers.0.mlp.experts.down_proj"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in stacks_of(model)


def test_a_pattern_that_names_nothing_lists_the_parameters_of_experts():
    with pytest.raises(ValueError, match="gate_up_proj"):
        convert(made(qwen3_moe), target_modules=["experts.nothing"])
