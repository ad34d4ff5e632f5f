"""A GPU quantizes to the bytes of the CPU and of bitsandbytes on the GPU: `pytest -m gpu tests/training`."""

import pytest
import torch

from lightning_qlora import PackedWeight, quantize
from lightning_qlora.kernels import ops
from tests.plugin.test_gpu import on_each_device

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_NORMAL = 2.0**-126  # bitsandbytes is built with --use_fast_math, which flushes smaller values to zero
WIDEST_GAP = 0.34  # between two levels of NF4 or FP4, as a share of the block's scale
CASES = [
    *((kind, dtype) for kind in ("normal", "zero blocks") for dtype in FLOATS),
    *(("subnormals", dtype) for dtype in FLOATS[:2]),
    ("outliers", torch.float32),
]


def hard_weight(kind, dtype):
    weight = torch.randn(37, 128, generator=torch.Generator().manual_seed(7)) * 0.02
    if kind == "zero blocks":
        weight[3:9] = 0
    elif kind == "subnormals":
        weight[3:9] *= 1e-38
    elif kind == "outliers":
        weight[::2, 5] = 300.0
    return weight.to(dtype)


@on_each_device
@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_are_those_of_the_cpu_and_of_bitsandbytes(device, kind, dtype, quant_type, double_quant):
    """On a CPU all bytes are equal. The CUDA kernels of bitsandbytes use inexact divisions, so that a value halfway
    between two levels may get the other one; they flush subnormals; and the codes of a zero block differ, but decode to
    zero as well.
    """
    weight = hard_weight(kind, dtype)
    cpu = quantize(weight, quant_type, double_quant=double_quant).to_bytes()
    packed = quantize(weight.to(device), quant_type, double_quant=double_quant)
    ours = packed.to_bytes()
    for name in ("packed", "absmax", "nested"):
        assert torch.equal(getattr(ours, name).cpu().view(-1), getattr(cpu, name).view(-1)), name
    for to in FLOATS:
        expected = PackedWeight.from_bytes(cpu, dtype).dequantize(to)
        assert torch.equal(ops.dequantize(ours, to).cpu(), expected)

    functional = pytest.importorskip("bitsandbytes").functional
    codes, state = functional.quantize_4bit(
        weight.to(device), blocksize=64, quant_type=quant_type, compress_statistics=double_quant
    )
    entries = {"weight": codes, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    theirs = PackedWeight.from_bnb_state_dict(entries).to_bytes()
    decoded = functional.dequantize_4bit(codes, state)
    assert (ops.dequantize(theirs, dtype) - decoded).abs().max() <= SMALLEST_NORMAL
    if double_quant:
        return
    assert (state.absmax - packed.absmax).abs().max() <= SMALLEST_NORMAL
    if device == "cpu":
        assert torch.equal(codes.view(-1), ours.packed.view(-1))
        return
    difference = (packed.dequantize(torch.float32) - decoded.float()).abs()
    scales = packed.absmax.repeat_interleave(64).view(weight.shape)
    rounded = torch.finfo(dtype).eps * scales  # bitsandbytes decodes to the type of the weight
    assert (difference <= WIDEST_GAP * scales + SMALLEST_NORMAL).all()
    assert (difference > rounded + SMALLEST_NORMAL).float().mean() <= 1e-3
