"""A matrix in fp16 with a power of two for each row, in one launch, and the powers out of sums; see `kernels/half.py`.

e = exponent of max |x| of a row's finite values - 13          values = fp16(x 2^-e)          factor = 2^e
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.half import MIDDLE, Half
from lightning_qlora.kernels.triton.dropout import MASK, dropout_arguments, is_kept
from lightning_qlora.kernels.triton.launch import find_tile, launch_of

INFINITY = tl.constexpr(0x7F800000)  # the bits of numbers that are not finite, without their sign, begin here
POWERS = tl.constexpr(MIDDLE)


@triton.jit
def _read(x, times, begin, n, stride, TIMES: tl.constexpr, SIZE: tl.constexpr):
    """SIZE values of a row, times those of a vector, and the bits of the largest finite magnitude."""
    i = begin + tl.arange(0, SIZE)
    value = tl.load(x + i.to(tl.int64) * stride, mask=i < n, other=0.0).to(tl.float32)
    if TIMES:
        value *= tl.load(times + i, mask=i < n, other=0.0)
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # without a sign, larger floats have larger bits
    return value, tl.max(tl.where(bits < INFINITY, bits, 0), 0)


@triton.jit
def _write(
    value, out, dropped, begin, n, row_stride, stride, low, high, least_kept, DROPOUT: tl.constexpr, SIZE: tl.constexpr
):
    """SIZE values of a row, and those that dropout keeps."""
    i = begin + tl.arange(0, SIZE)
    place = tl.program_id(0).to(tl.int64) * row_stride + i.to(tl.int64) * stride
    value = value.to(out.dtype.element_ty)
    tl.store(out + place, value, mask=i < n)
    if DROPOUT:
        tl.store(dropped + place, tl.where(is_kept(place, low, high, least_kept), value, 0.0), mask=i < n)


@triton.jit(do_not_specialize=MASK)
def _rows_kernel(
    x, times, out, factor, dropped, dropped_factor, n, row_stride, stride, low, high, least_kept, scale,
    TIMES: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """A program casts a row; what is not `WHOLE` is longer than SIZE, and its rest is read twice."""
    row = tl.program_id(0).to(tl.int64) * row_stride
    first, bits = _read(x + row, times, 0, n, stride, TIMES, SIZE)
    if not WHOLE:
        for begin in tl.range(SIZE, n, SIZE):
            bits = tl.maximum(bits, _read(x + row, times, begin, n, stride, TIMES, SIZE)[1])
    exponent = tl.maximum((bits >> 23) - POWERS, 1)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    power = (exponent << 23).to(tl.float32, bitcast=True)
    tl.store(factor + tl.program_id(0), power)
    if DROPOUT:
        tl.store(dropped_factor + tl.program_id(0), power * scale)
    _write(first * inverse, out, dropped, 0, n, row_stride, stride, low, high, least_kept, DROPOUT, SIZE)
    if not WHOLE:
        for begin in tl.range(SIZE, n, SIZE):
            value, _ = _read(x + row, times, begin, n, stride, TIMES, SIZE)
            _write(value * inverse, out, dropped, begin, n, row_stride, stride, low, high, least_kept, DROPOUT, SIZE)


@triton.jit
def take_out(total, first, second):
    """A sum times two powers of two in memory."""
    return times_powers(total, tl.load(first), tl.load(second))


@triton.jit
def times_powers(total, a, b):
    """The smaller one comes first, so that only the result can overflow."""
    return total * tl.minimum(a, b) * tl.maximum(a, b)


@triton.jit
def _take_out_kernel(
    sums, rows, columns, m, n, s, ROWS: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    a = tl.full((M,), 1.0, tl.float32)
    b = tl.full((N,), 1.0, tl.float32)
    if ROWS:
        a = tl.load(rows + row, mask=row < m, other=1.0)
    if COLUMNS:
        b = tl.load(columns + column, mask=column < n, other=1.0)
    place = sums + row.to(tl.int64)[:, None] * n + column[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    total = times_powers(tl.load(place, mask=inside, other=0.0), a[:, None], b[None, :]) * s
    tl.store(place, total, mask=inside)


def take_out_(sums: Tensor, rows: Tensor | None, columns: Tensor | None, s: float = 1.0) -> Tensor:
    """See `half.take_out`; the powers are those of all rows, and of all columns."""
    m, n = sums.shape
    if m and n:
        tile = find_tile("finish", sums.device)
        grid = -(-m // tile["M"]), -(-n // tile["N"]), 1
        given = {"ROWS": rows is not None, "COLUMNS": columns is not None}
        run = launch_of((), _take_out_kernel, sums.device, grid, (m, n), tile, **given)
        run((sums, sums if rows is None else rows, sums if columns is None else columns), (float(s),))
    return sums


def rows_to_half(x: Tensor, times: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None) -> Half:
    """See `reference.rows_to_half`; what dropout keeps is written in the same launch. `times` is [n]."""
    return _by_row(x, torch.float16, times, p, seed)


def _by_row(
    x: Tensor, dtype: torch.dtype, times: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None
) -> Half:
    m, n = x.shape
    if seed is None and x.mT.is_contiguous():
        out = torch.empty(n, m, dtype=dtype, device=x.device).mT
    else:
        x = x.contiguous()
        out = torch.empty(m, n, dtype=dtype, device=x.device)
    factor = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    half = Half(out, factor)
    dropped = half if seed is None else Half(torch.empty_like(out), torch.empty_like(factor))
    if m:
        tile = find_tile("rows_to_half", x.device, n)
        given = {"TIMES": times is not None, "DROPOUT": seed is not None, "WHOLE": n <= tile["SIZE"]}
        run = launch_of((x.dtype, dtype), _rows_kernel, x.device, (m, 1, 1), (n, *x.stride()), tile, **given)
        tensors = x, factor if times is None else times, out, factor, dropped.values, dropped.factor
        run(tensors, dropout_arguments(p, seed, x.device))
    return half if seed is None else half._replace(dropped=dropped)


def scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `half.scaled`; one program reads all of x, which is the scales of a weight."""
    out, factor, _ = _by_row(x.view(1, -1), dtype)
    return out.view(x.shape), factor.view(1)
