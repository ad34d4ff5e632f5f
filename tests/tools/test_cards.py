"""`plan --gpu T4`: the memory of a card, and what a card without bf16 needs more."""

import re

import pytest
from transformers import LlamaConfig

from lightning_qlora import estimate_memory
from lightning_qlora.tools import cli
from lightning_qlora.tools.cards import find_card

CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=512, dtype="bfloat16"
)


def parts(**arguments):
    return estimate_memory(CONFIG, sequence_length=32, r=4, **arguments).parts


def test_a_card_without_bf16_holds_the_model_in_fp32():
    with_bf16 = parts(gpu="RTX 4090")
    without = parts(gpu="T4")
    assert with_bf16 == parts()
    assert without == parts(compute_dtype="fp16")
    assert without["other frozen weights"] == 2 * with_bf16["other frozen weights"]
    assert parts(gpu="V100", compute_dtype="fp32")["other frozen weights"] == without["other frozen weights"]


@pytest.mark.parametrize("name", ["T4", "NVIDIA Tesla T4", "tesla-t4"])
def test_plan_knows_the_memory_of_a_card(tmp_path, capsys, name):
    CONFIG.save_pretrained(tmp_path)
    cli.main(["plan", str(tmp_path), "--sequence_length", "32", "--gpu", name])
    assert "of 16.11 GB (15 GiB)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("A100-80GB", 80),
        ("NVIDIA A100-SXM4-80GB", 80),
        ("A100-PCIE-40GB", 40),
        ("A100", 40),
        ("GeForce RTX 4060 Ti", 8),
    ],
)
def test_names_with_a_size_and_those_of_drivers(name, size):
    assert find_card(name, "gpu").memory == size * 2**30


def test_memory_that_is_passed_counts(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    cli.main(["plan", str(tmp_path), "--sequence_length", "32", "--gpu", "V100", "--gpu_memory", "32GiB"])
    assert "(32 GiB)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpu", "device", "message"),
    [
        ("GTX 980", "gpu", "gpu='GTX 980': must be one of t4, .*gpu_memory=24GiB"),
        ("T4", "cpu", "gpu='T4': is for device='gpu', not for device='cpu'. Leave out one of the two"),
    ],
)
def test_a_card_that_is_not_known_or_that_a_cpu_does_not_have(gpu, device, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message):
        parts(gpu=gpu, device=device)
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["plan", str(tmp_path), "--device", device, "--gpu", gpu])
    assert re.search(message, capsys.readouterr().err)
