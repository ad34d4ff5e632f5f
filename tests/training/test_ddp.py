"""strategy="ddp" on two CPU processes, started by Lightning's own launcher."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_qlora import convert
from tests.conftest import launch, tensors
from tests.toys import toy


def reported(script: str, folder: Path, fits: int = 1) -> list[dict]:
    stdout, results = launch(script, folder)
    assert stdout.count("parameters train") == fits, "the report of each fit is printed once, by rank 0"
    return results


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_ddp_trains_agrees_on_all_ranks_and_resumes_bit_equal(tmp_path):
    ranks = reported("tests.scripts.ddp_training", tmp_path, fits=4)
    straight, first, resumed, started = (
        [rank[name] for rank in ranks] for name in ("straight", "first", "resumed", "started")
    )
    assert same(straight[0]["state"], straight[1]["state"])
    assert any(value.abs().sum() > 0 for name, value in straight[0]["state"].items() if "lora_B" in name)
    saved = load_file(tmp_path / "straight/adapter/adapter_model.safetensors")
    trained = [value for name, value in straight[0]["state"].items() if name.endswith("lora_B")]
    assert all(any(torch.equal(value, other) for other in saved.values()) for value in trained)
    assert straight[0]["losses"] != straight[1]["losses"], "each rank has its own share of the data"
    names = torch.load(first[0]["best"], weights_only=True)["state_dict"]
    assert "net.0.lora_A" in names
    assert "net.0.packed" not in names
    assert "net.2.weight" not in names, "DDP's broadcast must not make frozen parameters look trained"
    for rank in range(2):
        assert same(straight[rank]["state"], resumed[rank]["state"])
        assert resumed[rank]["losses"] == straight[rank]["losses"][8:]
        for key, state in straight[rank]["optimizer"].items():
            assert all(torch.equal(value, resumed[rank]["optimizer"][key][name]) for name, value in state.items())
    assert same(started[0]["tensors"], started[1]["tensors"]), "all ranks hold the 4-bit weights of rank 0"
    assert started[0]["sent"] == ["net.5.running_mean", "net.5.running_var", "net.5.num_batches_tracked"]


def test_every_rank_quantizes_what_it_loads_in_configure_model(tmp_path):
    pytest.importorskip("transformers")
    model = toy("llama").bfloat16()
    model.save_pretrained(tmp_path / "base")
    convert(model, r=4)
    first, second = reported("tests.scripts.ddp_loading", tmp_path)
    assert same(first, second)
    norm = first["model.model.norm.weight"]
    assert norm.dtype is torch.float32 and (norm != 1).all()
    assert sum(name.endswith("lora_B") and value.abs().sum() > 0 for name, value in first.items()) == 14
    for name, value in tensors(model).items():
        if name.endswith((".packed", ".absmax", ".nested")):
            assert torch.equal(first[f"model.{name}"], value)
