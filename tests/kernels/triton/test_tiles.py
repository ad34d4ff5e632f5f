"""The search for tiles, whose candidates run here in the interpreter."""

import json
from importlib import import_module

import pytest
import torch

from benchmarks import tiles as search
from lightning_qlora.kernels.triton import launch

SMALL = {"SHAPES": ((64, 128),), "EXPERT_SHAPES": ((64, 128),), "EXPERTS": 2, "RANK": 4}


def run_once(functions, device, rounds):
    for function in functions.values():
        function()
    return dict.fromkeys(functions, 1.0)


@pytest.mark.parametrize("kernel", search.ROWS)
def test_candidates_and_what_runs_without_a_tile(kernel, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(search, name, value)
    monkeypatch.setattr(search, "seconds", run_once)
    monkeypatch.setattr(launch, "TABLE", dict(launch.TABLE))
    used = []
    find = launch.find_tile
    for name in ("quantize", "linear", "matmul", "lora_products", "grouped", "dropout"):
        module = import_module(f"lightning_qlora.kernels.triton.{name}")
        monkeypatch.setattr(module, "find_tile", lambda *key: used.append(find(*key)) or used[-1])
    tile = search.candidates(kernel, 16)[0]
    assert search.measure(kernel, 16, [tile], torch.device("cpu")).keys() == {json.dumps(tile), "torch"}
    assert tile in used
