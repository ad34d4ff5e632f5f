"""The sums with the matrices of an adapter that one program computes, each a loop with masks and tensor cores.

    over columns   total[m, r] = sum_k drop(x)[m, k] w[r, k]
    over ranks     total[m, n] = sum_r h[m, r] w[n, r]
    over rows      total[r, n] = sum_m h[m, r] drop(x)[m, n]

`row`, `rank` and `column` are the indices of the program's elements; those from `end`, r, and k or n on do not exist.
w has any strides, and is rounded to the type of the other factor; x in fp32 is rounded to a 16-bit type.
"""

import triton
import triton.language as tl

from lightning_qlora.kernels.triton.dropout import is_kept


@triton.jit
def sum_over_columns(
    x, w, cast, row, end, rank, r, k, begin, stop, rank_stride, stride, low, high, least_kept,
    DROPOUT: tl.constexpr, CAST: tl.constexpr, R: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """[M, R], over the steps from `begin` to `stop` of K columns; CAST: it writes x in the type of `cast`, else x."""
    total = tl.zeros((M, R), tl.float32)
    for step in tl.range(begin, stop):
        column = step * K + tl.arange(0, K)
        place = row.to(tl.int64)[:, None] * k + column[None, :]
        inside = (row < end)[:, None] & (column < k)[None, :]
        inputs = tl.load(x + place, mask=inside, other=0.0).to(cast.dtype.element_ty)
        if CAST:
            tl.store(cast + place, inputs, mask=inside)
        if DROPOUT:
            inputs = tl.where(is_kept(place, low, high, least_kept), inputs, 0.0)
        at = w + column[:, None] * stride + rank[None, :] * rank_stride
        weights = tl.load(at, mask=(column < k)[:, None] & (rank < r)[None, :], other=0.0)
        total += tl.dot(inputs, weights.to(cast.dtype.element_ty), input_precision="ieee")
    return total


@triton.jit
def sum_over_ranks(
    h, w, row, end, column, n, r, rank_stride, stride, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """[M, N]."""
    total = tl.zeros((M, N), tl.float32)
    for begin in tl.range(0, r, R):
        rank = begin + tl.arange(0, R)
        at = h + row.to(tl.int64)[:, None] * r + rank[None, :]
        inputs = tl.load(at, mask=(row < end)[:, None] & (rank < r)[None, :], other=0.0)
        at = w + rank[:, None] * rank_stride + column[None, :] * stride
        weights = tl.load(at, mask=(rank < r)[:, None] & (column < n)[None, :], other=0.0)
        total += tl.dot(inputs, weights.to(h.dtype.element_ty), input_precision="ieee")
    return total


@triton.jit
def sum_over_rows(
    h, x, first, end, rank, r, column, n, begin, stop, low, high, least_kept,
    DROPOUT: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[R, N], over the steps from `begin` to `stop` of M rows, from the row `first` on."""
    total = tl.zeros((R, N), tl.float32)
    for step in tl.range(begin, stop):
        row = first + step * M + tl.arange(0, M)
        at = h + row.to(tl.int64)[None, :] * r + rank[:, None]
        factors = tl.load(at, mask=(row < end)[None, :] & (rank < r)[:, None], other=0.0)
        place = row.to(tl.int64)[:, None] * n + column[None, :]
        inputs = tl.load(x + place, mask=(row < end)[:, None] & (column < n)[None, :], other=0.0)
        inputs = inputs.to(h.dtype.element_ty)
        if DROPOUT:
            inputs = tl.where(is_kept(place, low, high, least_kept), inputs, 0.0)
        total += tl.dot(factors, inputs, input_precision="ieee")
    return total
