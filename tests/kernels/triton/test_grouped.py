"""The layers of several experts in one launch each, against the reference and against one layer after another."""

from itertools import product

import pytest
import torch

from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.kernels import reference
from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.quantization.packed_weight import stack_bytes
from tests.kernels.triton.test_linear import assert_near

UNEVEN = [0, 3, 17, 0, 70, 1, 0]  # rows of each expert: none at the ends and in the middle, more than a tile


def experts(counts, n, k, r, dtype, quant_type="nf4", block_size=64, double_quant=True, beyond=0):
    """x, dY, ends, W, A, B; `beyond` rows belong to no expert."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    weights = [reference.quantize(normal(n, k) / k**0.5, quant_type, block_size, double_quant) for _ in counts]
    lora_a, lora_b = normal(len(counts), r, k) / k**0.5, normal(len(counts), n, r) / r**0.5
    rows, ends = sum(counts) + beyond, torch.tensor(counts).cumsum(0).int()
    return normal(rows, k).to(dtype), normal(rows, n).to(dtype), ends, stack_bytes(weights), lora_a, lora_b


def check(x, grad, ends, weight, lora_a, lora_b, p=0.0):
    choices = (ends, weight, LoRA(lora_a, lora_b, 0.7, p, torch.tensor([5]) if p else None))
    y, xa = kernels.grouped_linear(x, *choices)
    expected, expected_xa = reference.grouped_linear(x, *choices)
    assert_near(y, expected, x.dtype)
    assert_near(xa, expected_xa, x.dtype)
    ours = kernels.grouped_linear_backward(grad, x, expected_xa, *choices)
    for mine, yours in zip(ours, reference.grouped_linear_backward(grad, x, expected_xa, *choices), strict=True):
        assert_near(mine, yours, x.dtype)
    last = int(ends[-1])
    assert not y[last:].any() and not ours[0][last:].any()
    begins = [0, *ends.tolist()]
    for e, end in enumerate(ends.tolist()):
        if end == begins[e]:
            assert not ours[1][e].any() and not ours[2][e].any()


@pytest.mark.parametrize(("dtype", "p"), [(torch.bfloat16, 0.3), (torch.float32, 0.0)])
def test_uneven_groups(dtype, p):
    check(*experts(UNEVEN, 70, 128, 4, dtype, beyond=5), p=p)


@pytest.mark.parametrize(
    ("quant_type", "block_size", "double_quant"),
    [*product(QUANT_TYPES, [64], [True, False]), ("nf4", 32, True), ("nf4", 32, False), ("nf4", 256, True)],
)
def test_every_format_and_block_size(quant_type, block_size, double_quant):
    """Also blocks that cross rows (192 columns in blocks of 256), and ranks that are no whole number of tiles."""
    check(*experts([5, 0, 2], 24, 192, 20, torch.float16, quant_type, block_size, double_quant))


def test_many_rows_of_one_expert_and_rank_1():
    check(*experts([0, 66], 66, 64, 1, torch.bfloat16))


def test_nothing_of_the_size_of_a_weight_is_allocated(monkeypatch):
    x, grad, ends, weight, *adapter = experts([2, 1], 128, 128, 4, torch.bfloat16)
    choices = ends, weight, LoRA(*adapter, 0.7)
    made = []
    for name in ("empty", "zeros", "empty_like", "zeros_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: made.append(make(*a, **k)) or made[-1])
    for name in ("new_empty", "new_zeros"):
        make = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, make=make, **k: made.append(make(*a, **k)) or made[-1])
    _, xa = kernels.grouped_linear(x, *choices)
    kernels.grouped_linear_backward(grad, x, xa, *choices)
    floats = [tensor.numel() for tensor in made if tensor.is_floating_point()]  # the interpreter copies arguments
    assert floats and max(floats) <= 2 * 4 * 128
