"""The products with the matrices of an adapter, one launch each, with dropout inside.

    lora_down       out[m, r] = s sum_k drop(x)[m, k] w[r, k]                   x A^T, and dY B in the backward pass
    lora_up         out[m, n] = s sum_r h[m, r] w[n, r]  (or its dropout)       (x A^T) B^T, and (dY B) A
    lora_gradients  dA[r, k] = sum_m dXA[m, r] drop(x)[m, k]  and  dB[n, r] = s sum_m dY[m, n] XA[m, r]

One side of these products is the rank, so they are bound by memory: x is read once, an fp32 adapter is rounded to x's
type inside, a gradient is written in the adapter's type. The functions give the launch for some sizes.
"""

import torch
import triton
import triton.language as tl

from lightning_qlora.kernels.triton.adapter_sums import sum_over_columns, sum_over_ranks, sum_over_rows
from lightning_qlora.kernels.triton.dropout import MASK, NO_DROPOUT, is_kept
from lightning_qlora.kernels.triton.half import times_powers
from lightning_qlora.kernels.triton.launch import Launch, add_shares, find_tile, launch_of, shared_launch

MAX_GRID = 65535  # programs in the second and third dimension of a CUDA grid


@triton.jit(do_not_specialize=MASK)
def _down_kernel(
    x, w, out, memory, cast, m, k, r, w_rank_stride, w_stride, shares, low, high, least_kept, s,
    DROPOUT: tl.constexpr, CAST: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A program computes M x R sums over its share of the columns of x."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    rank = tl.program_id(1) * R + tl.arange(0, R)
    share = tl.program_id(2)
    steps = tl.cdiv(k, K)
    per_share = tl.cdiv(steps, shares)
    begin = share * per_share
    stop = tl.minimum(begin + per_share, steps)
    tl.assume(begin < stop)  # with a path past the loop, whose sums are zeros, sm_90 waits for each wgmma
    total = sum_over_columns(
        x, w, cast, row, m, rank, r, k, begin, stop, w_rank_stride, w_stride, low, high, least_kept, DROPOUT, CAST,
        R, M, K,
    )  # fmt: skip
    write = (row < m)[:, None] & (rank < r)[None, :]
    if SPLIT:
        total, is_last = add_shares(total, memory, share, shares, M, R)
        write &= is_last
    place = row.to(tl.int64)[:, None] * r + rank[None, :]
    tl.store(out + place, (total * s).to(out.dtype.element_ty), mask=write)


@triton.jit(do_not_specialize=MASK)
def _up_kernel(
    h, w, out, m, n, r, w_rank_stride, w_stride, low, high, least_kept, s,
    DROPOUT: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program computes M x N elements of the output."""
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    total = sum_over_ranks(h, w, row, m, column, n, r, w_rank_stride, w_stride, R, M, N)
    total *= s
    place = row.to(tl.int64)[:, None] * n + column[None, :]
    if DROPOUT:
        total = tl.where(is_kept(place, low, high, least_kept), total, 0.0)
    inside = (row < m)[:, None] & (column < n)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    tile, h, x, out, memory, m, n, r, out_rank_stride, out_stride, shares,
    low, high, least_kept, s,
    DROPOUT: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program computes the R x N sums of one tile of columns over its share of the rows of x."""
    column = tile * N + tl.arange(0, N)
    rank = tl.program_id(1) * R + tl.arange(0, R)
    share = tl.program_id(2)
    steps = tl.cdiv(m, M)
    per_share = tl.cdiv(steps, shares)
    total = sum_over_rows(
        h, x, 0, m, rank, r, column, n, share * per_share, tl.minimum((share + 1) * per_share, steps),
        low, high, least_kept, DROPOUT, R, M, N,
    )  # fmt: skip
    write = (rank < r)[:, None] & (column < n)[None, :]
    if SPLIT:
        total, is_last = add_shares(total, memory, share, shares, R, N)
        write &= is_last
    place = rank.to(tl.int64)[:, None] * out_rank_stride + column[None, :].to(tl.int64) * out_stride
    tl.store(out + place, (total * s).to(out.dtype.element_ty), mask=write)


@triton.jit(do_not_specialize=MASK)
def _gradients_kernel(
    grad_xa, x, grad_a, xa, grad, grad_b, memory, m, k, n, r, a_rank_stride, a_stride, b_rank_stride, b_stride, shares,
    low, high, least_kept, s_a, s_b,
    DROPOUT: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The first programs compute the gradient of A, the others that of B."""
    tile = tl.program_id(0)
    tiles_of_a = tl.cdiv(k, N)
    if tile < tiles_of_a:
        _gradient(
            tile, grad_xa, x, grad_a, memory, m, k, r, a_rank_stride, a_stride, shares,
            low, high, least_kept, s_a, DROPOUT, SPLIT, R, M, N,
        )  # fmt: skip
    else:
        _gradient(
            tile - tiles_of_a, xa, grad, grad_b, memory, m, n, r, b_rank_stride, b_stride,
            shares, 0, 0, 0, s_b, False, SPLIT, R, M, N,
        )  # fmt: skip


@triton.jit(do_not_specialize=MASK)
def _finish_kernel(
    h, w, bias, first, second, out, m, n, r, w_rank_stride, w_stride, low, high, least_kept, s,
    DROPOUT: tl.constexpr, BIAS: tl.constexpr, POWERS: tl.constexpr, R: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """A program adds M x N elements of it, and a bias, to sums in fp32; it takes the powers out of those of `Half`."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    total = sum_over_ranks(h, w, row, m, column, n, r, w_rank_stride, w_stride, R, M, N) * s
    place = row.to(tl.int64)[:, None] * n + column[None, :]
    if DROPOUT:
        total = tl.where(is_kept(place, low, high, least_kept), total, 0.0)
    if BIAS:
        total += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    sums = tl.load(out + place, mask=inside, other=0.0)
    if POWERS:
        sums = times_powers(sums, tl.load(first + row, mask=row < m, other=1.0)[:, None], tl.load(second))
    tl.store(out + place, total + sums, mask=inside)


Types = tuple[torch.dtype, ...]


def lora_down(
    device: torch.device, m: int, k: int, r: int, strides: tuple[int, int], dropout: bool, types: Types
) -> Launch:
    """Tensors: x [m, k], w [r, k] of these strides, out [m, r], memory, and x, or its cast to the type of out.

    `types`: of x, w and out.
    """
    of_x, of_w, of_out = types
    casts = of_x is not of_out
    tile = find_tile("lora_down_fp32" if casts else "lora_down", device, m)
    rank = rank_tile(r)
    grid = -(-m // tile["M"]), -(-r // rank)
    numbers = m, k, r, *strides
    steps = -(-k // tile["K"])
    sums = tile["M"] * rank
    types = of_x, of_w, of_out, torch.float32, of_out
    constants = {"DROPOUT": dropout, "CAST": casts, "R": rank}
    return shared_launch(_down_kernel, device, grid, numbers, tile, steps, sums, types, NO_DROPOUT, **constants)


def lora_up(device: torch.device, m: int, n: int, r: int, strides: tuple[int, int], dropout: bool) -> Launch:
    """Tensors: h [m, r], w [n, r] of these strides, out [m, n]."""
    tile = find_tile("lora_up", device, m)
    grid = -(-n // tile["N"]), -(-m // tile["M"]), 1
    numbers = m, n, r, *strides[::-1]
    return Launch(_up_kernel, device, grid, numbers, tile, fuse=True, DROPOUT=dropout, R=rank_tile(r))


def finish(
    types: tuple[torch.dtype, ...], device: torch.device, m: int, n: int, r: int, strides: tuple[int, int],
    dropout: bool, has_bias: bool,
) -> Launch:  # fmt: skip
    """Tensors: h [m, r], w [n, r] of these strides, bias or any, powers of rows and a power or any, sums.

    `types`: of w, the bias and h; h in fp32 is of `Half`, which have powers. The sums become the output. It needs no
    tensor cores: beside the bytes of the sums a rank of 64 takes little time.
    """
    tile = find_tile("finish", device)
    grid = -(-m // tile["M"]), -(-n // tile["N"]), 1
    has_powers = types[-1] is torch.float32
    constants = {"DROPOUT": dropout, "BIAS": has_bias, "POWERS": has_powers, "R": min(rank_tile(r), tile["RANKS"])}
    return launch_of(types, _finish_kernel, device, grid, (m, n, r, *strides[::-1]), tile, fuse=True, **constants)


def lora_gradients(
    device: torch.device,
    m: int,
    k: int,
    n: int,
    r: int,
    strides: tuple[int, int, int, int],
    dropout: bool,
    types: Types,
) -> Launch:
    """Tensors: dXA [m, r], x [m, k], dA [r, k], xa [m, r], dY [m, n], dB [n, r], memory.

    `strides`: of dA and dB, whose types are the adapter's. `types`: of x, A, B and the others.
    """
    tile = find_tile("lora_gradients", device, m)
    rank = rank_tile(r)
    grid = -(-k // tile["N"]) + -(-n // tile["N"]), -(-r // rank)
    numbers = m, k, n, r, *strides[:2], *strides[:1:-1]
    steps = -(-m // tile["M"])
    sums = rank * tile["N"]
    of_x, of_a, of_b, others = types
    types = others, of_x, of_a, others, others, of_b, torch.float32
    scales = *NO_DROPOUT, 1.0
    return shared_launch(
        _gradients_kernel, device, grid, numbers, tile, steps, sums, types, scales, DROPOUT=dropout, R=rank
    )


def rank_tile(r: int) -> int:
    """Ranks per program: a power of two, at least the 16 that tensor cores take, at most 64 for the registers."""
    return min(max(16, int(triton.next_power_of_2(r))), 64)
