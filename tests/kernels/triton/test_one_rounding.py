"""The measure of `tests/kernels/test_one_rounding.py` for the kernels: few rows, many rows, experts."""

import pytest
import torch

from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.triton import launch
from tests.conftest import every_pair
from tests.kernels.shares import experts, shares
from tests.kernels.test_one_rounding import backend


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter takes as long for a large tile as for a small one."""
    for name in ("lora_down", "lora_up", "lora_gradients", "matmul", "grouped"):
        tile = launch.Tile(launch.TABLE[name]["default"][-1], M=128, **{} if name == "lora_down" else {"N": 512})
        monkeypatch.setitem(launch.TABLE, name, {"default": [tile]})


@pytest.mark.parametrize(("dtype", "bias", "rows"), every_pair([torch.bfloat16, torch.float16], [None, 8.0], [64, 128]))
def test_the_share_of_a_small_adapter(rows, bias, dtype):
    repeats = 256 // rows if bias and dtype is torch.bfloat16 else 1
    assert shares(backend(kernels), rows, 64, 1024, dtype, bias, repeats) == pytest.approx([1, 1], abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_share_of_experts(dtype):
    assert shares(experts(kernels, [70, 128]), 128, 128, 128, dtype) == pytest.approx([1, 1], abs=0.1)
