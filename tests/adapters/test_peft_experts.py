"""Adapters of experts: PEFT computes our logits from our folders, and we PEFT's from PEFT's."""

import copy
from itertools import cycle

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_qlora import CheckpointMismatchError, convert, load_adapter, save_adapter
from lightning_qlora.adapters.peft_folder import read_adapter, write_adapter
from lightning_qlora.checkpoints.from_checkpoint import read_adapter_from_checkpoint
from lightning_qlora.experts.experts import ExpertParameter
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.adapters.folders import assert_same_folders, assert_same_tensors, read_config
from tests.experts import test_experts as toys
from tests.huggingface.test_experts_on_load import deepseek_v3, mixtral
from tests.toys import expert_stacks, perturb

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers")


FAMILIES = (toys.qwen3_moe, mixtral, toys.gpt_oss, deepseek_v3, toys.llama4, toys.nemotron_h, toys.jetmoe)


def unfreeze(model):
    """What is frozen beside trainable adapters would stay as it is."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def converted(build, seed=0, **arguments):
    """A model with its experts and linear layers in 4 bits, and adapters that are not 0."""
    model = toys.made(build).eval()
    toys.convert_stacks(model)
    unfreeze(model)
    convert(model, r=2, lora_alpha=4, lora_dropout=0.1, **arguments)
    torch.manual_seed(seed)
    for layer in adapted_layers(model).values():
        for parameter in (layer.lora_A, layer.lora_B):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def decoded_base(build, model):
    """The dense model with the decoded 4-bit weights, without adapters."""
    dense, weights = toys.made(build).eval(), {}
    for name, _, _, stack in expert_stacks(model.named_modules()):
        weights[name] = stack.decode()
    for name, layer in adapted_layers(model).items():
        if name not in weights:
            weights[f"{name}.weight"] = layer.decode()
    _, unexpected = dense.load_state_dict(weights, strict=False)
    assert weights and not unexpected
    return dense


def logits(model):
    return toys.outputs(model).logits.detach()


@pytest.mark.parametrize("build", FAMILIES)
def test_peft_reads_ours(build, tmp_path):
    model = converted(build)
    save_adapter(model, tmp_path)
    base = decoded_base(build, model)
    assert (logits(base) - logits(model)).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("build", "rslora"), [*zip(FAMILIES, cycle([False, True]), strict=False)])
def test_we_read_pefts(build, rslora, tmp_path):
    model = converted(build)
    names = [name for name, _, _, _ in expert_stacks(model.named_modules())]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=rslora, target_modules=["q_proj"],
        alpha_pattern={names[0].replace(".", r"\."): 7},
        rank_pattern={names[0].replace(".", r"\."): 2},
        target_parameters=sorted({".".join(name.split(".")[-2:]) for name in names}),
    )  # fmt: skip
    if build in (deepseek_v3, toys.jetmoe):
        config.target_modules = ["o_proj"]
    theirs = peft.get_peft_model(decoded_base(build, model), config)
    perturb(theirs, scale=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    save_adapter(model, tmp_path / "ours")
    before = load_file(tmp_path / "theirs/adapter_model.safetensors")
    after = load_file(tmp_path / "ours/adapter_model.safetensors")
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("dense", [[], ["down_proj.weight"], ["model.layers.0.mlp.up_proj.weight"]])
def test_we_read_pefts_parameters_beside_dense_layers_of_their_names(dense, tmp_path):
    """`layers.0.mlp.down_proj` is a linear layer, and `layers.1.mlp.experts.down_proj` a parameter of experts."""
    model = converted(deepseek_v3)
    base = decoded_base(deepseek_v3, model)
    config = peft.LoraConfig(
        r=2, target_modules=["o_proj"], target_parameters=["gate_up_proj", "down_proj", *dense],
        alpha_pattern={"mlp.*weight": 3, "mlp.*": 5, "o_proj": 7},
    )  # fmt: skip
    perturb(peft.get_peft_model(copy.deepcopy(base), config), scale=0.1).save_pretrained(tmp_path)
    load_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), atol=1e-5, rtol=1e-5)
    convert(started := toys.made(deepseek_v3), adapter=str(tmp_path))
    layers = adapted_layers(started)
    expected = {name: layer for name, layer in adapted_layers(model).items() if layer.lora_B.any()}
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.lora_B, expected[name].lora_B) and layer.scaling == expected[name].scaling


def test_what_is_written_of_experts(tmp_path):
    model = converted(toys.gpt_oss, target_modules=["q_proj"])
    save_adapter(model, tmp_path)
    config = read_config(tmp_path)
    assert config["target_modules"] == ["q_proj"] and config["lora_dropout"] == 0
    assert config["target_parameters"] == [
        f"model.layers.{i}.mlp.experts.{key}" for i in (0, 1) for key in ("down_proj", "gate_up_proj")
    ]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_"
    stack = model.model.layers[1].mlp.experts.gate_up_proj_experts
    assert torch.equal(tensors[f"{key}A.weight"][6:], stack.lora_A[3])  # rank 2: rows 6 and 7 are expert 3
    assert torch.equal(tensors[f"{key}B.weight"][:, 3::4], stack.lora_B[3])  # 4 experts: columns 3 and 7


def test_what_peft_has_no_place_for_is_refused_and_nothing_is_written(tmp_path):
    flat = toys.made(toys.dbrx)
    toys.convert_stacks(flat)
    dora = toys.made(toys.qwen3_moe)
    convert(dora, r=2, use_dora=True)
    for model, name, why in (
        (flat, "transformer.blocks.0.ffn.experts.mlp.w2", "one matrix"),
        (dora, "model.layers.0.mlp.experts.", "no DoRA"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*no place in a PEFT folder.*{why}"):
            save_adapter(model, tmp_path / "a")
        assert not (tmp_path / "a").exists()


def test_errors_name_file_and_key(tmp_path):
    save_adapter(converted(toys.qwen3_moe, target_modules=["q_proj"]), tmp_path)
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight"

    def refused(model, match):
        with pytest.raises(CheckpointMismatchError, match=match) as error:
            load_adapter(model, tmp_path)
        assert str(tmp_path / "adapter_model.safetensors") in str(error.value)

    refused(converted(lambda: toys.qwen3_moe(num_experts=5)), "layers.0.mlp.experts.*has 5 experts of 32 inputs and 64")
    # 12 rows are 4 experts of rank 3 too, but the config has rank 2.
    refused(converted(lambda: toys.qwen3_moe(num_experts=4)), "layers.0.mlp.experts.*has 4 experts of 32 inputs and 64")
    refused(converted(lambda: toys.qwen3_moe(num_hidden_layers=1)), "layers.1.mlp.experts.*has no such layer")
    unknown = toys.made(toys.qwen3_moe)
    unknown.model.layers[0].mlp.experts.num_experts = None  # which says which parameters are stacks
    convert(unknown, r=2)
    refused(unknown, "layers.0.mlp.experts.lora_A.* has no stack of experts in 'down_proj' there")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[key], tensors[key.replace("lora_A", "lora_B")]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    refused(converted(toys.qwen3_moe), "layers.1.mlp.experts.lora_A.*target_parameters names: gate_up_proj, down_proj")
    flat = toys.made(toys.dbrx)  # for all experts PEFT has one pair of matrices
    config = peft.LoraConfig(r=2, target_modules=["Wqkv"], target_parameters=["w2"])
    peft.get_peft_model(copy.deepcopy(flat), config).save_pretrained(tmp_path)
    toys.convert_stacks(flat)
    refused(flat, r"mlp.lora_A.* has 4 experts \(all in one matrix, with one adapter for each expert\) of 64 inputs")


def test_the_order_of_conversion_does_not_matter(tmp_path):
    model, reverse = converted(toys.qwen3_moe), toys.made(toys.qwen3_moe).eval()
    for name, owner in list(reverse.named_modules()):
        for key in ("down_proj", "gate_up_proj"):
            if key in owner._parameters and owner._parameters[key].ndim == 3:
                part = ExpertParameter(owner, key, 6, False)
                part.convert(toys.CONFIG, f"{name}.{key}", None, f"{name}.{key}")
    unfreeze(reverse)
    convert(reverse, r=2, lora_alpha=4)
    save_adapter(model, tmp_path)
    load_adapter(reverse, tmp_path)
    torch.testing.assert_close(logits(reverse), logits(model))


def test_adapters_of_experts_are_written_again(tmp_path):
    unfreeze(model := toys.made(toys.qwen3_moe))
    convert(model, r=2, target_modules=["q_proj", "o_proj", "gate_up_proj"], rank_pattern={"gate_up_proj": 3})
    save_adapter(model, tmp_path / "a")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.ckpt")
    for number, again in enumerate((read_adapter(tmp_path / "a"), read_adapter_from_checkpoint(tmp_path / "x.ckpt"))):
        write_adapter(again, tmp_path / str(number))
        assert_same_folders(tmp_path / "a", tmp_path / str(number))
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")  # as PEFT writes it: without our metadata
    write_adapter(read_adapter(tmp_path / "a"), tmp_path / "c")
    assert_same_tensors(tmp_path / "a", tmp_path / "c")
