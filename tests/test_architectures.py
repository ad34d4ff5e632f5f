"""Tiny transformers models of many kinds; what is checked of each is in `tests/architectures/checks.py`."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from torch import nn

from lightning_qlora import QLoRAConfig, merge
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.selection.selection import select_layers
from tests.architectures.checks import CHECKS, Lit, fitted
from tests.architectures.models import ALL, FOLDERS, MODELS, configuration
from tests.toys import ids

# Loading and merging are worth a test where transformers converts the tensors of a folder; the others are slow tests.
# Mixtures with dense layers beside their experts, which PEFT adapts as parameters.
MIXTURES = [
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm_moe_dsa", "hunyuan_v1_moe", "ernie4_5_moe",
    "longcat_flash", "afmoe", "solar_open", "qwen3_next",
]  # fmt: skip
DEFAULT = {
    "trains": MODELS,
    "recomputes": MODELS,
    "loads": ["nomic_bert", "dinov2:swiglu"],
    "merges": ["vit", *FOLDERS],
    "PEFT": [],
    "own folder": ["llama", "gpt2", *MIXTURES],
    "generates": [],
}
CASES = [
    pytest.param(check, kind, marks=[] if kind in DEFAULT[check] else pytest.mark.slow, id=f"{kind}-{check}")
    for kind in ALL
    for check in CHECKS
]


def needs_kind(kind):
    if kind.partition(":")[0] not in transformers.CONFIG_MAPPING:
        pytest.skip(f"{kind} is not in this version of transformers")


@pytest.mark.parametrize(("check", "kind"), CASES)
def test_a_tiny_model(check, kind, tmp_path):
    needs_kind(kind)
    if why := CHECKS[check](kind, tmp_path):
        pytest.skip(why)


@pytest.mark.parametrize(
    "kind",
    [
        "exaone:LlamaForCausalLM",
        "unlimited_ocr:UnlimitedOcrForConditionalGeneration",
        "qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration",
        "clvp:ClvpModelForConditionalGeneration",
        "decision_transformer:DecisionTransformerModel",
    ],
)
def test_folders_of_difficult_classes(kind, tmp_path):
    """transformers would rename a parameter again, asks for a dense one, or writes a config.json that does not fit.

    The last two have both Conv1D and linear layers, some of them square.
    """
    needs_kind(kind)
    assert CHECKS["merges"](kind, tmp_path) is None


MOE = [
    "qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "granitemoe", "llama4_text", "dbrx", "jetmoe",
    "longcat_flash", "hunyuan_v1_moe", "nllb-moe", "switch_transformers", "afmoe",
]  # fmt: skip


@pytest.mark.parametrize("kind", MOE)
def test_experts_are_in_4_bits_and_routers_are_not(kind):
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(configuration(kind))
    choice = select_layers(model, QLoRAConfig(r=2))
    packed = {*choice.convert, *(f"{name}.weight" for name in choice.convert)}
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "norm" not in name}
    routers = {name for name in matrices if {"router", "gate", "classifier"} & set(name.split("."))}
    experts = {name for name in matrices if "experts" in name} - routers
    assert routers and experts
    assert not routers & packed
    total = sum(map(matrices.get, experts))
    quantized = sum(map(matrices.get, experts & packed))
    assert quantized / total >= 0.95
    dense = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)} - choice.convert.keys()
    assert {f"{name}.weight" for name in dense} <= routers


def test_reformer_says_what_it_needs(tmp_path):
    """Its layers run inside an autograd function, which records nothing if its inputs need no gradient."""
    sizes = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "attention_head_size": 16,
        "feed_forward_size": 128,
        "attn_layers": ["local"],
        "local_attn_chunk_length": 4,
        "axial_pos_embds": False,
        "vocab_size": 128,
        "is_decoder": True,
    }
    model = transformers.ReformerModelWithLMHead(transformers.ReformerConfig(**sizes)).train()
    lit = Lit(model, {"input_ids": ids()})
    with pytest.raises(RuntimeError, match=r"loss needs no gradient.*enable_input_require_grads\(\).*model\.train\(\)"):
        fitted(lit, tmp_path)
    model.enable_input_require_grads()
    fitted(lit, tmp_path)
    assert all(layer.lora_B.any() for layer in adapted_layers(lit).values())


@pytest.mark.parametrize("rescale_every", [2, 0])
def test_rwkv_in_evaluation(rescale_every, tmp_path):
    """It divides weights in place, which a 4-bit weight refuses; without that its outputs are the same."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 4}
    config = transformers.RwkvConfig(**sizes, context_length=64, use_cache=False, rescale_every=rescale_every)
    lit = Lit(transformers.RwkvForCausalLM(config).train(), {"input_ids": ids()})
    fitted(lit, tmp_path)
    lit.eval()
    if rescale_every:
        with pytest.raises(RuntimeError, match=r"div_.*read-only.*name the layers in exclude_modules"):
            lit.outputs()
    else:
        twin = transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes, context_length=64, rescale_every=2))
        twin.load_state_dict(merge(copy.deepcopy(lit)).model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(lit.outputs()[0], twin.eval()(ids()).logits, atol=1e-4, rtol=1e-4)
