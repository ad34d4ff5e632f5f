"""One AdamW step over all tensors in one launch, with 32-bit or blockwise 8-bit state.

A LoRA model has hundreds of small tensors, so one launch per tensor would cost more than the arithmetic. The kernels
get a table of addresses with one row per tensor, and every program finds its row by a binary search for its number.
The same in torch, with the formulas and a description of the 8-bit state: `kernels/adamw.py`.
"""

import math
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.adamw import LARGEST, STATE_BLOCK_SIZE, AdamWStep, Moment
from lightning_qlora.kernels.triton.launch import Launch, find_tile
from lightning_qlora.quantization.codebooks import dynamic_map

_LARGEST = tl.constexpr(LARGEST)
COLUMNS = 8  # of the table: first program, number of elements, addresses of p, g, m, v, scales of m, scales of v


@triton.jit
def _find(table, STEPS: tl.constexpr, WIDTH: tl.constexpr):
    """The row of this program's tensor; the table has 2^STEPS rows of WIDTH."""
    program = tl.program_id(0)
    low = 0
    for step in tl.static_range(STEPS):
        row = low + (1 << (STEPS - 1 - step))
        if tl.load(table + row * WIDTH) <= program:
            low = row
    return table + low * WIDTH


@triton.jit
def _pointer(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _nearest(values, bounds):
    """How many of the 255 ascending bounds are below each value, by a binary search."""
    rank = tl.zeros(values.shape, tl.int32)
    for step in tl.static_range(8):
        rank = tl.where(values > tl.load(bounds + rank + ((128 >> step) - 1)), rank + (128 >> step), rank)
    return rank


@triton.jit
def _quantize_state(values, codes, scales, bounds, i, block, inside, begins):
    values = tl.where(inside, values, 0.0)  # past the end of a tensor, the first level was read, which is not zero
    largest = tl.max(tl.abs(values), axis=1)
    inverse = tl.div_rn(1.0, tl.where(largest == 0, 1.0, largest))
    tl.store(scales + block, largest, mask=begins)
    tl.store(codes + i, _nearest(values * inverse[:, None], bounds).to(tl.uint8), mask=inside)


@triton.jit
def _adamw_kernel(
    table,
    p_like,
    g_like,
    levels,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    rate,
    correction2,
    correction1,
    IN_8_BITS: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A program updates BLOCKS x BLOCK elements.

    `levels` of state in 8 bits, fp32 [4, 256]: the levels of m, of v, the bounds between those of m, and of v.
    """
    row = _find(table, STEPS, WIDTH)
    n = tl.load(row + 1)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    block = (tl.program_id(0) - tl.load(row)) * BLOCKS + tl.arange(0, BLOCKS)
    begins = block * BLOCK < n
    i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = i < n
    param = _pointer(row, 2, p_like.dtype.element_ty, ALIGNED) + i
    grad = _pointer(row, 3, g_like.dtype.element_ty, ALIGNED) + i
    p = tl.load(param, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    STATE: tl.constexpr = tl.uint8 if IN_8_BITS else tl.float32
    exp_avg = _pointer(row, 4, STATE, ALIGNED)
    exp_avg_sq = _pointer(row, 5, STATE, ALIGNED)
    m = tl.load(exp_avg + i, mask=inside, other=0)
    v = tl.load(exp_avg_sq + i, mask=inside, other=0)
    if IN_8_BITS:
        m_scales = _pointer(row, 6, tl.float32, ALIGNED)
        v_scales = _pointer(row, 7, tl.float32, ALIGNED)
        m = tl.load(levels + m.to(tl.int32)) * tl.load(m_scales + block, mask=begins, other=0.0)[:, None]
        v = tl.load(levels + 256 + v.to(tl.int32)) * tl.load(v_scales + block, mask=begins, other=0.0)[:, None]
    m = m * beta1 + g * rest1
    v = v * beta2 + g * g * rest2
    if IN_8_BITS:
        v = tl.minimum(v, _LARGEST)  # an infinite scale would make NaN of all elements of the block
    denominator = tl.div_rn(tl.sqrt_rn(v), correction2)
    if IN_8_BITS:
        denominator = tl.maximum(denominator, tl.div_rn(tl.abs(m), correction1))
    p = p * decay - rate * tl.div_rn(m, denominator + eps)
    tl.store(param, p.to(p_like.dtype.element_ty), mask=inside)
    if IN_8_BITS:
        _quantize_state(m, exp_avg, m_scales, levels + 512, i, block, inside, begins)
        _quantize_state(v, exp_avg_sq, v_scales, levels + 768, i, block, inside, begins)
    else:
        tl.store(exp_avg + i, m, mask=inside)
        tl.store(exp_avg_sq + i, v, mask=inside)


@cache
def _levels(device: str) -> Tensor:
    maps = [dynamic_map(True, device=device), dynamic_map(False, device=device)]
    infinity = maps[0].new_tensor([math.inf])
    return torch.stack([*maps, *(torch.cat([(each[:-1] + each[1:]) / 2, infinity]) for each in maps)])


@lru_cache(maxsize=64)
def _table(sizes: tuple[int, ...], columns: tuple[tuple[int, ...], ...], per_program: int, device: str) -> Tensor:
    """The table on the device, int64 [power of two, COLUMNS]; cached, because the next step has the same tensors."""
    first = 0
    rows = []
    for size, addresses in zip(sizes, zip(*columns, strict=True), strict=True):
        rows.append([first, size, *addresses, *[0] * (COLUMNS - 2 - len(addresses))])
        first += -(-size // per_program)
    rows += [[first] * COLUMNS] * (triton.next_power_of_2(len(rows)) - len(rows))  # rows that no program uses
    return torch.tensor(rows, device=device)


def adamw_step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], scalars: AdamWStep
) -> None:
    _step([params, grads, exp_avgs, exp_avg_sqs], scalars)


def adamw8bit_step(
    params: list[Tensor], grads: list[Tensor], exp_avg: Moment, exp_avg_sq: Moment, scalars: AdamWStep
) -> None:
    _step([params, grads, exp_avg[0], exp_avg_sq[0], exp_avg[1], exp_avg_sq[1]], scalars)


@torch.no_grad()
def _step(lists: list[list[Tensor]], scalars: AdamWStep) -> None:
    """One launch, before which nothing is written; state of two lists is in fp32, of four in 8 bits."""
    kinds = {(param.dtype, grad.dtype) for param, grad in zip(*lists[:2], strict=True)}
    assert len(kinds) == 1, f"the kernels read all parameters as one type, and all gradients; got {kinds}"
    tensors = [[tensor.contiguous() for tensor in column] for column in lists]  # usually no copies
    device = tensors[0][0].device
    tile = find_tile("adamw", device)
    per_program = STATE_BLOCK_SIZE * tile["BLOCKS"]
    columns = tuple(tuple(tensor.data_ptr() for tensor in column) for column in tensors)
    sizes = tuple(param.numel() for param in tensors[0])
    in_8_bits = len(lists) == 6
    correction1 = 1 - scalars.beta1**scalars.step
    floats = (
        scalars.beta1,
        1 - scalars.beta1,
        scalars.beta2,
        1 - scalars.beta2,
        scalars.eps,
        1 - scalars.lr * scalars.weight_decay,
        scalars.lr / correction1,
        math.sqrt(1 - scalars.beta2**scalars.step),
        correction1,
    )
    launch = Launch(
        _adamw_kernel,
        device,
        (sum(-(-size // per_program) for size in sizes), 1, 1),
        (),
        tile,
        IN_8_BITS=in_8_bits,
        STEPS=(len(sizes) - 1).bit_length(),
        WIDTH=COLUMNS,
        BLOCK=STATE_BLOCK_SIZE,
        ALIGNED=all(number % 16 == 0 for column in (sizes, *columns) for number in column),
    )
    table = _table(sizes, columns, per_program, str(device))
    levels = _levels(str(device)) if in_8_bits else table
    # Torch does not see that the kernels write; autograd must know it.
    launch((table, tensors[0][0], tensors[1][0], levels), floats, lists[0])
    for column, copies in zip(lists, tensors, strict=True):
        for tensor, copy in zip(column, copies, strict=True):
            if copy is not tensor and column is not lists[1]:  # gradients do not change
                tensor.copy_(copy)
