"""The experts of an adapter in a folder: merged as the module is, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_qlora import CheckpointMismatchError, convert, save_adapter
from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.adapters.save_load import get_adapter
from lightning_qlora.huggingface.merge_folder import merge_folder
from lightning_qlora.layers.experts import expert_stacks
from tests.adapters.test_peft_experts import converted, deepseek_v3, logits, mixtral, olmoe
from tests.layers import test_experts as toys

pytest.importorskip("transformers", minversion="5")
FAMILIES = (toys.qwen3_moe, mixtral, toys.gpt_oss, deepseek_v3, olmoe, toys.llama4, toys.jetmoe)


def saved(build, folder, fused=False):
    model = toys.made(build)
    model.save_pretrained(folder, save_original_format=not fused)
    return folder


@pytest.mark.parametrize("build", FAMILIES)
@pytest.mark.parametrize("fused", [False, True], ids=["as transformers saves it", "fused"])
def test_the_merged_folder_computes_what_the_model_does(build, fused, tmp_path):
    model, base = converted(build), saved(build, tmp_path / "base", fused)
    merge_folder(base, get_adapter(model), tmp_path / "out")
    merged = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("build", [toys.qwen3_moe, toys.llama4])
@pytest.mark.parametrize("pefts", [False, True])
def test_a_folder_of_ours_and_of_peft(build, pefts, tmp_path):
    model, base = converted(build), saved(build, tmp_path / "base")
    save_adapter(model, tmp_path / "a")
    if pefts:  # whose folders don't say what we know of the experts
        file = tmp_path / "a/adapter_model.safetensors"
        save_file(load_file(file), file)
    for name, source in (("x", get_adapter(model)), ("y", read_adapter(tmp_path / "a"))):
        merge_folder(base, source, tmp_path / name, base="float")
    expected, found = load_file(tmp_path / "x/model.safetensors"), load_file(tmp_path / "y/model.safetensors")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_16_bit_experts_are_rounded_as_other_layers(tmp_path):
    model, base = converted(toys.qwen3_moe), saved(toys.qwen3_moe, tmp_path / "base")
    merge_folder(base, get_adapter(model), tmp_path / "out", dtype="bf16")
    merged = load_file(tmp_path / "out/model.safetensors")
    gate = merged["model.layers.1.mlp.experts.4.gate_proj.weight"]
    _, _, _, stack = list(expert_stacks(model))[2]
    assert gate.dtype is torch.bfloat16
    torch.testing.assert_close(gate.float(), stack.layers[4].effective_weight()[:32].detach(), atol=4e-3, rtol=8e-3)


OTHER_NUMBERS = [
    (4, False, r"layers.0.mlp.experts.* does not fit .*other: it has no tensor of '.*experts.*4'"),
    (8, False, r"experts.6.\w+.weight'.* is of a further expert, not one of 6"),
    (4, True, r"model.safetensors: .*experts.* has shape \[4, .*not 6 experts"),
    (8, True, r"model.safetensors: .*experts.* has shape \[8, .*not 6 experts"),
]


@pytest.mark.parametrize(("number", "fused", "message"), OTHER_NUMBERS)
def test_another_number_of_experts_is_refused_by_file_and_key(number, fused, message, tmp_path):
    model = toys.made(toys.qwen3_moe)
    convert(model, r=2, init_lora_weights="loftq")
    other = saved(lambda: toys.qwen3_moe(num_experts=number), tmp_path / "other", fused)
    with pytest.raises(CheckpointMismatchError, match=message):
        merge_folder(other, get_adapter(model), tmp_path / "out")
    with pytest.raises(CheckpointMismatchError, match=message):
        save_adapter(model, tmp_path / "out", base="float", base_model=other)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_by_file_and_key(tmp_path):
    adapter = get_adapter(converted(toys.qwen3_moe))
    wide = saved(lambda: toys.qwen3_moe(moe_intermediate_size=64), tmp_path / "wide")
    with pytest.raises(CheckpointMismatchError, match=r"experts.0.down_proj.weight' has 64 outputs and 64 inputs"):
        merge_folder(wide, adapter, tmp_path / "out")
    base = saved(toys.qwen3_moe, tmp_path / "base")
    file = base / "model.safetensors"
    save_file({key: value.double() if "experts" in key else value for key, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"experts.* is F64 of shape .* into a matrix of type F32, BF16"):
        merge_folder(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
