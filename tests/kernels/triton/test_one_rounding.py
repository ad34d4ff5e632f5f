"""The measure of `tests/kernels/test_one_rounding.py` for the kernels: few rows, many rows, experts."""

import pytest
import torch

from lightning_qlora.kernels import triton as kernels
from tests.conftest import every_pair
from tests.kernels.shares import experts, shares
from tests.kernels.test_one_rounding import backend


@pytest.mark.parametrize(("dtype", "bias", "rows"), every_pair([torch.bfloat16, torch.float16], [None, 8.0], [16, 128]))
def test_the_share_of_a_small_adapter(rows, bias, dtype):
    outputs = 1024 if bias and dtype is torch.bfloat16 else 256
    assert shares(backend(kernels), rows, 64, outputs, dtype, bias, 256 // rows) == pytest.approx([1, 1], abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_share_of_experts(dtype):
    assert shares(experts(kernels, [70, 128]), 128, 128, 128, dtype) == pytest.approx([1, 1], abs=0.1)
