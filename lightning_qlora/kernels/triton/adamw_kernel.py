"""One AdamW step over all tensors in one launch, with 32-bit or blockwise 8-bit state.

A LoRA model has hundreds of small tensors, so one launch per tensor would cost more than the arithmetic. The kernels
get a table of addresses with one row per tensor, and every program finds its row by a binary search for its number.
The same in torch, with the formulas and a description of the 8-bit state: `kernels/reference.py`.
"""

import math
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.reference import LARGEST, STATE_BLOCK_SIZE, AdamWStep, Moment
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
def _size(row, ALIGNED: tl.constexpr):
    """The number of elements."""
    size = tl.load(row + 1)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return size


@triton.jit
def _pointer(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column, as a pointer."""
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _parameter_and_gradient(row, p_like, g_like, i, inside, ALIGNED: tl.constexpr):
    """Pointers to elements of the parameter, these elements, and their gradients, in fp32."""
    param = _pointer(row, 2, p_like.dtype.element_ty, ALIGNED) + i
    grad = _pointer(row, 3, g_like.dtype.element_ty, ALIGNED) + i
    p = tl.load(param, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    return param, p, g


@triton.jit
def _moments(m, v, g, beta1, rest1, beta2, rest2):
    return m * beta1 + g * rest1, v * beta2 + g * g * rest2


@triton.jit
def _new_value(p, m, denominator, decay, rate):
    return p * decay - rate * tl.div_rn(m, denominator)


@triton.jit
def _adamw_kernel(
    table,
    p_like,
    g_like,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    rate,
    correction2,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """State in fp32; a program updates BLOCKS x BLOCK elements."""
    row = _find(table, STEPS, WIDTH)
    i = (tl.program_id(0) - tl.load(row)) * (BLOCK * BLOCKS) + tl.arange(0, BLOCK * BLOCKS)
    inside = i < _size(row, ALIGNED)
    param, p, g = _parameter_and_gradient(row, p_like, g_like, i, inside, ALIGNED)
    exp_avg = _pointer(row, 4, tl.float32, ALIGNED)
    exp_avg_sq = _pointer(row, 5, tl.float32, ALIGNED)
    m = tl.load(exp_avg + i, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq + i, mask=inside, other=0.0)
    m, v = _moments(m, v, g, beta1, rest1, beta2, rest2)
    tl.store(exp_avg + i, m, mask=inside)
    tl.store(exp_avg_sq + i, v, mask=inside)
    p = _new_value(p, m, tl.div_rn(tl.sqrt_rn(v), correction2) + eps, decay, rate)
    tl.store(param, p.to(p_like.dtype.element_ty), mask=inside)


@triton.jit
def _nearest(values, bounds):
    """How many of the 255 ascending bounds are below each value, by a binary search."""
    rank = tl.zeros(values.shape, tl.int32)
    for step in tl.static_range(8):
        rank = tl.where(values > tl.load(bounds + rank + ((128 >> step) - 1)), rank + (128 >> step), rank)
    return rank


@triton.jit
def _quantize_state(values, codes, scales, bounds, i, block, inside, begins):
    """Store the codes and scales of fp32 values [blocks, 256]."""
    largest = tl.max(tl.abs(values), axis=1)
    inverse = tl.div_rn(1.0, tl.where(largest == 0, 1.0, largest))
    tl.store(scales + block, largest, mask=begins)
    tl.store(codes + i, _nearest(values * inverse[:, None], bounds).to(tl.uint8), mask=inside)


@triton.jit
def _adamw8bit_kernel(
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
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """State in 8 bits; `levels`, fp32 [4, 256]: the levels of m, of v, the bounds between those of m, and of v."""
    row = _find(table, STEPS, WIDTH)
    n = _size(row, ALIGNED)
    block = (tl.program_id(0) - tl.load(row)) * BLOCKS + tl.arange(0, BLOCKS)
    begins = block * BLOCK < n
    i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = i < n
    param, p, g = _parameter_and_gradient(row, p_like, g_like, i, inside, ALIGNED)
    m_codes = _pointer(row, 4, tl.uint8, ALIGNED)
    v_codes = _pointer(row, 5, tl.uint8, ALIGNED)
    m_scales = _pointer(row, 6, tl.float32, ALIGNED)
    v_scales = _pointer(row, 7, tl.float32, ALIGNED)
    m = tl.load(levels + tl.load(m_codes + i, mask=inside, other=0).to(tl.int32))
    v = tl.load(levels + 256 + tl.load(v_codes + i, mask=inside, other=0).to(tl.int32))
    m *= tl.load(m_scales + block, mask=begins, other=0.0)[:, None]
    v *= tl.load(v_scales + block, mask=begins, other=0.0)[:, None]
    m, v = _moments(m, v, g, beta1, rest1, beta2, rest2)
    v = tl.minimum(v, _LARGEST)  # an infinite scale would make NaN of all elements of the block
    root = tl.div_rn(tl.sqrt_rn(v), correction2)
    p = _new_value(p, m, tl.maximum(root, tl.div_rn(tl.abs(m), correction1)) + eps, decay, rate)
    tl.store(param, p.to(p_like.dtype.element_ty), mask=inside)
    # Past the end of a tensor, m and v were read as the first level, which is not zero.
    _quantize_state(tl.where(inside, m, 0.0), m_codes, m_scales, levels + 512, i, block, inside, begins)
    _quantize_state(tl.where(inside, v, 0.0), v_codes, v_scales, levels + 768, i, block, inside, begins)


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
    """See `kernels.reference.adamw_step`."""
    _step(_adamw_kernel, [params, grads, exp_avgs, exp_avg_sqs], scalars)


def adamw8bit_step(
    params: list[Tensor], grads: list[Tensor], exp_avg: Moment, exp_avg_sq: Moment, scalars: AdamWStep
) -> None:
    """See `kernels.reference.adamw8bit_step`."""
    tensors = [params, grads, exp_avg[0], exp_avg_sq[0], exp_avg[1], exp_avg_sq[1]]
    _step(_adamw8bit_kernel, tensors, scalars, _levels(str(params[0].device)))


@torch.no_grad()
def _step(kernel: triton.JITFunction, lists: list[list[Tensor]], scalars: AdamWStep, *levels: Tensor) -> None:
    """One launch, before which nothing is written."""
    kinds = {(param.dtype, grad.dtype) for param, grad in zip(*lists[:2], strict=True)}
    assert len(kinds) == 1, f"the kernels read all parameters as one type, and all gradients; got {kinds}"
    tensors = [[tensor.contiguous() for tensor in column] for column in lists]  # usually no copies
    device = tensors[0][0].device
    tile = find_tile("adamw", device)
    per_program = STATE_BLOCK_SIZE * tile["BLOCKS"]
    columns = tuple(tuple(tensor.data_ptr() for tensor in column) for column in tensors)
    sizes = tuple(param.numel() for param in tensors[0])
    correction1 = 1 - scalars.beta1**scalars.step
    floats: tuple[float, ...] = (
        scalars.beta1,
        1 - scalars.beta1,
        scalars.beta2,
        1 - scalars.beta2,
        scalars.eps,
        1 - scalars.lr * scalars.weight_decay,
        scalars.lr / correction1,
        math.sqrt(1 - scalars.beta2**scalars.step),
    )
    if levels:  # the 8-bit kernel has one more
        floats += (correction1,)
    programs = sum(-(-size // per_program) for size in sizes)
    launch = Launch(
        kernel,
        device,
        (programs, 1, 1),
        (),
        tile,
        STEPS=(len(sizes) - 1).bit_length(),
        WIDTH=COLUMNS,
        BLOCK=STATE_BLOCK_SIZE,
        ALIGNED=all(number % 16 == 0 for column in (sizes, *columns) for number in column),
    )
    likes = tensors[0][0], tensors[1][0]
    # Torch does not see that the kernels write; autograd must know it.
    launch((_table(sizes, columns, per_program, str(device)), *likes, *levels), floats, lists[0])
    for column, copies in zip(lists, tensors, strict=True):
        for tensor, copy in zip(column, copies, strict=True):
            if copy is not tensor and column is not lists[1]:  # gradients do not change
                tensor.copy_(copy)
