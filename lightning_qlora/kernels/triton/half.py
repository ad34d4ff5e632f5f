"""A matrix in fp16 with the power of two of its largest value, in two launches; see `kernels/half.py`.

    largest[i] = max |x| of the finite values of program i
    e = exponent of max largest - 13          values = fp16(x 2^-e)          factor = 2^e

The programs of the second launch all compute e from the few numbers of the first. The bits are those of `half.to_half`.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.half import MIDDLE, Half
from lightning_qlora.kernels.scratch import scratch
from lightning_qlora.kernels.triton.launch import MAX_LAUNCHES, Launch, find_tile

PROGRAMS = tl.constexpr(256)  # of the first launch, at most
INFINITY = tl.constexpr(0x7F800000)  # the bits of numbers that are not finite, without their sign, begin here
POWERS = tl.constexpr(MIDDLE)


@triton.jit
def _largest_kernel(x, largest, n, programs, SIZE: tl.constexpr):
    bits = tl.zeros((SIZE,), tl.int32)
    for begin in tl.range(tl.program_id(0).to(tl.int64) * SIZE, n, programs * SIZE):
        i = begin + tl.arange(0, SIZE)
        value = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
        magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # without a sign, larger floats have larger bits
        bits = tl.maximum(bits, tl.where(magnitude < INFINITY, magnitude, 0))
    tl.store(largest + tl.program_id(0), tl.max(bits, 0))


@triton.jit
def _divide_kernel(x, largest, out, factor, n, programs, SIZE: tl.constexpr):
    number = tl.arange(0, PROGRAMS)
    bits = tl.max(tl.load(largest + number, mask=number < programs, other=0), 0)
    exponent = tl.maximum((bits >> 23) - POWERS, 1)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    if tl.program_id(0) == 0:
        tl.store(factor, (exponent << 23).to(tl.float32, bitcast=True))
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32) * inverse
    tl.store(out + i, value.to(out.dtype.element_ty), mask=i < n)


@triton.jit
def take_out(total, first, second):
    """A sum times two powers of two, of which the smaller comes first, so that only the result can overflow."""
    a = tl.load(first)
    b = tl.load(second)
    return total * tl.minimum(a, b) * tl.maximum(a, b)


def to_half(x: Tensor) -> Half:
    return Half(*scaled(x.contiguous(), torch.float16))


def scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    factor = torch.empty(1, dtype=torch.float32, device=x.device)
    largest = scratch(PROGRAMS.value, torch.int32, x.device, "largest")
    find, divide = _launches(x.device, x.numel(), x.dtype, dtype)
    find((x, largest))
    divide((x, largest, out, factor))
    return out, factor


@lru_cache(MAX_LAUNCHES)
def _launches(device: torch.device, n: int, *types: torch.dtype) -> tuple[Launch, Launch]:
    tile = find_tile("dropout", device)  # the same work: each number is read once
    pieces = -(-n // tile["SIZE"])
    programs = max(1, min(pieces, PROGRAMS.value))
    arguments: Any = (n, programs), tile
    return (
        Launch(_largest_kernel, device, (programs, 1, 1), *arguments),
        Launch(_divide_kernel, device, (max(1, pieces), 1, 1), *arguments),
    )
