"""The layers of several experts in one launch each, against the reference and against one layer after another."""

from itertools import product

import pytest
import torch

from lightning_qlora.kernels import reference
from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.grouped_linear import can_group, grouped_linear
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.kernels.triton import grouped
from lightning_qlora.quantization.packed_weight import stack_bytes
from tests.kernels.triton.test_linear import DTYPES, assert_near

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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_uneven_groups(dtype, p):
    check(*experts(UNEVEN, 70, 128, 4, dtype, beyond=5), p=p)


@pytest.mark.parametrize(
    ("quant_type", "block_size", "double_quant"),
    [*product(["nf4", "fp4", "int4"], [64], [True, False]), ("nf4", 32, True), ("nf4", 32, False), ("nf4", 256, True)],
)
def test_every_format_and_block_size(quant_type, block_size, double_quant):
    """Also blocks that cross rows (192 columns in blocks of 256), and ranks that are no whole number of tiles."""
    check(*experts([5, 0, 2], 24, 192, 20, torch.float16, quant_type, block_size, double_quant))


@pytest.mark.parametrize("r", [1, 16, 70])
def test_many_rows_of_one_expert(r):
    check(*experts([0, 66], 66, 64, r, torch.bfloat16))


def test_the_groups_take_the_rows_of_their_layers():
    """Outputs and gradients, through autograd, of one layer after another: not of our own reference."""
    x, grad, ends, weight, lora_a, lora_b = experts(UNEVEN, 70, 128, 4, torch.float32)
    leaves = [x, lora_a, lora_b]
    for leaf in leaves:
        leaf.requires_grad_()
    y = grouped_linear(x, ends, weight, LoRA(lora_a, lora_b, 0.7))
    ours = torch.autograd.grad(y, leaves, grad)
    parts = x.split(UNEVEN)
    expected = torch.cat(
        [
            lora_linear(part, w, None, LoRA(a, b, 0.7))
            for part, w, a, b in zip(parts, weight.unbind(), lora_a, lora_b, strict=True)
        ]
    )
    theirs = torch.autograd.grad(expected, leaves, grad)
    assert_near(y, expected, torch.float32)
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=2e-5, atol=2e-5)


def test_no_rows_at_all():
    x, grad, ends, weight, *adapter = experts([0, 0], 100, 128, 4, torch.bfloat16)
    choices = ends, weight, LoRA(*adapter, 0.7)
    y, xa = kernels.grouped_linear(x, *choices)
    grads = kernels.grouped_linear_backward(grad, x, xa, *choices)
    assert y.shape == (0, 100) and grads[0].shape == (0, 128)
    assert grads[1].shape == (2, 4, 128) and grads[2].shape == (2, 100, 4) and not grads[1].any()


def test_nothing_of_the_size_of_a_weight_is_allocated(monkeypatch):
    x, grad, ends, weight, *adapter = experts([2, 1], 512, 512, 4, torch.bfloat16)
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
    assert floats and max(floats) <= 2 * 4 * 512


def test_what_it_leaves_to_one_layer_after_another(monkeypatch):
    x, _, _, weight, a, b = experts([2, 3], 64, 128, 4, torch.bfloat16)
    assert can_group(x, weight, LoRA(a, b))
    assert not can_group(x, weight, LoRA(a, b.mT.contiguous().mT))
    assert not can_group(x, weight, LoRA(a.bfloat16(), b))
    shifted = torch.zeros(a.numel() + 1)[1:].view(a.shape)
    assert not can_group(x, weight, LoRA(shifted, b))
    ragged, _, _, ragged_weight, ragged_a, ragged_b = experts([2, 3], 64, 100, 4, torch.bfloat16)
    assert not can_group(ragged, ragged_weight, LoRA(ragged_a, ragged_b))
    with pytest.raises(ValueError, match="4-bit weight"):
        can_group(x, weight._replace(packed=weight.packed[:, :-1]), LoRA(a, b))
    monkeypatch.setattr(grouped, "find_tile", lambda *_: {})  # as on Turing
    assert not can_group(x, weight, LoRA(a, b))


def test_a_wrong_width_is_refused():
    x, _, ends, weight, *adapter = experts([2, 3], 64, 128, 4, torch.bfloat16)
    with pytest.raises(ValueError, match=r"x must be \[rows, 128\].*got \[5, 127\]"):
        grouped_linear(x[:, 1:], ends, weight, LoRA(*adapter, 0.7))
