"""The products with the matrices of an adapter, one launch each, with dropout inside.

    lora_down       out[m, r] = s sum_k drop(x)[m, k] w[r, k]                   x A^T, and dY B in the backward pass
    lora_up         out[m, n] = s sum_r h[m, r] w[n, r]  (or its dropout)       (x A^T) B^T, and (dY B) A
    lora_gradients  dA[r, k] = sum_m dXA[m, r] drop(x)[m, k]  and  dB[n, r] = s sum_m dY[m, n] XA[m, r]

One side of these products is the rank, so they are bound by memory: x is read once, an fp32 adapter is rounded to x's
type inside, a gradient is written in the adapter's type. fp32 inputs, and cards for which `tiles.json` has no tile, use
torch's products, and dropout in a launch of its own.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.half import Half, multiply
from lightning_qlora.kernels.products import product
from lightning_qlora.kernels.scratch import scratch
from lightning_qlora.kernels.triton.adapter_sums import sum_over_columns, sum_over_ranks, sum_over_rows
from lightning_qlora.kernels.triton.dropout import MASK, dropout, dropout_arguments, is_kept
from lightning_qlora.kernels.triton.half import take_out
from lightning_qlora.kernels.triton.launch import (
    MAX_LAUNCHES,
    NO_TILE,
    Launch,
    Tile,
    add_shares,
    find_tile,
    launch_of,
    shared_launch,
)

MAX_GRID = 65535  # programs in the second and third dimension of a CUDA grid


@triton.jit(do_not_specialize=MASK)
def _down_kernel(
    x, w, out, memory, x_factor, w_factor, m, k, r, w_rank_stride, w_stride, shares, low, high, least_kept, s,
    DROPOUT: tl.constexpr, HALF: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
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
        x, w, row, m, rank, r, k, begin, stop, w_rank_stride, w_stride, low, high, least_kept, DROPOUT, R, M, K
    )
    write = (row < m)[:, None] & (rank < r)[None, :]
    if SPLIT:
        total, is_last = add_shares(total, memory, share, shares, M, R)
        write &= is_last
    if HALF:
        total = take_out(total, x_factor, w_factor)
    place = row.to(tl.int64)[:, None] * r + rank[None, :]
    tl.store(out + place, (total * s).to(out.dtype.element_ty), mask=write)


@triton.jit(do_not_specialize=MASK)
def _up_kernel(
    h, w, out, h_factor, w_factor, first, second, m, n, r, w_rank_stride, w_stride, low, high, least_kept, s,
    DROPOUT: tl.constexpr, HALF: tl.constexpr, ADD: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program computes M x N elements of the output, or adds them to what is there times two powers of two."""
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    total = sum_over_ranks(h, w, row, m, column, n, r, w_rank_stride, w_stride, R, M, N)
    if HALF:
        total = take_out(total, h_factor, w_factor)
    total *= s
    place = row.to(tl.int64)[:, None] * n + column[None, :]
    if DROPOUT:
        total = tl.where(is_kept(place, low, high, least_kept), total, 0.0)
    inside = (row < m)[:, None] & (column < n)[None, :]
    if ADD:
        total += take_out(tl.load(out + place, mask=inside, other=0.0), first, second)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    tile, h, x, out, memory, h_factor, x_factor, m, n, r, out_rank_stride, out_stride, shares,
    low, high, least_kept, s,
    DROPOUT: tl.constexpr, HALF: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
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
    if HALF:
        total = take_out(total, h_factor, x_factor)
    place = rank.to(tl.int64)[:, None] * out_rank_stride + column[None, :].to(tl.int64) * out_stride
    tl.store(out + place, (total * s).to(out.dtype.element_ty), mask=write)


@triton.jit(do_not_specialize=MASK)
def _gradients_kernel(
    grad_xa, x, grad_a, xa, grad, grad_b, memory, grad_xa_factor, x_factor, xa_factor, grad_factor,
    m, k, n, r, a_rank_stride, a_stride, b_rank_stride, b_stride, shares, low, high, least_kept, s_a, s_b,
    DROPOUT: tl.constexpr, HALF: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The first programs compute the gradient of A, the others that of B."""
    tile = tl.program_id(0)
    tiles_of_a = tl.cdiv(k, N)
    if tile < tiles_of_a:
        _gradient(
            tile, grad_xa, x, grad_a, memory, grad_xa_factor, x_factor, m, k, r, a_rank_stride, a_stride, shares,
            low, high, least_kept, s_a, DROPOUT, HALF, SPLIT, R, M, N,
        )  # fmt: skip
    else:
        _gradient(
            tile - tiles_of_a, xa, grad, grad_b, memory, xa_factor, grad_factor, m, n, r, b_rank_stride, b_stride,
            shares, 0, 0, 0, s_b, False, HALF, SPLIT, R, M, N,
        )  # fmt: skip


def lora_down(x: Tensor | Half, w: Tensor | Half, s: float = 1.0, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """s drop(x) w^T: x [m, k] and w [r, k] of any strides -> [m, r] in x's type, or of `Half` in fp32."""
    m, k = x.shape
    r = w.shape[0]
    tile = _tile("lora_down", x, m, r)
    if not tile:
        return product(_dropped(x, p, seed), w.T, s)
    mask, scale = dropout_arguments(p, seed, x.device)
    of_x, of_w = _parts(x), _parts(w)
    run = _down(x.device, tile, (m, k, r, *of_w.values.stride()), seed is not None, isinstance(x, Half))
    out = of_x.values.new_empty(m, r, dtype=torch.float32 if isinstance(x, Half) else x.dtype)
    tensors = of_x.values.contiguous(), of_w.values, out, run.memory(out), of_x.factor, of_w.factor
    run(tensors, (*mask, s * scale))
    return out


@lru_cache(MAX_LAUNCHES)
def _down(device: torch.device, tile: Tile, numbers: tuple[int, ...], dropout: bool, half: bool) -> Launch:
    m, k, r, *_ = numbers
    rank = rank_tile(r)
    grid = -(-m // tile["M"]), -(-r // rank)
    steps = -(-k // tile["K"])
    constants: Any = {"DROPOUT": dropout, "HALF": half, "R": rank}
    return shared_launch(_down_kernel, device, grid, numbers, tile, steps, tile["M"] * rank, **constants)


def lora_up(
    h: Tensor | Half, w: Tensor | Half, out: Tensor, s: float = 1.0, p: float = 0.0, seed: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Write s h w^T, or its dropout, to `out`: h [m, r], w [n, r] of any strides, out [m, n]; returns out.

    With `factors`, it is added to out times these two powers of two.
    """
    m, n = out.shape
    r = w.shape[1]
    # What is added to takes registers, so its tiles are smaller.
    tile = _tile("lora_up" if factors is None else "lora_up_add", h, m, r)
    if not tile or m > MAX_GRID * tile["M"]:
        return _up_by_torch(h, w, out, s, p, seed, factors)
    mask, scale = dropout_arguments(p, seed, h.device)
    of_h, of_w = _parts(h), _parts(w)
    numbers = m, n, r, *of_w.values.stride()[::-1]
    run = _up(h.device, tile, numbers, seed is not None, isinstance(h, Half), factors is not None)
    first, second = factors or (out, out)
    run((of_h.values, of_w.values, out, of_h.factor, of_w.factor, first, second), (*mask, s * scale))
    return out


def _up_by_torch(
    h: Tensor | Half, w: Tensor | Half, out: Tensor, s: float, p: float, seed: Tensor | None,
    factors: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    if isinstance(h, Half) and isinstance(w, Half) and out.numel():
        added = multiply(h.values, w.values.T)
        mask, scale = dropout_arguments(p, seed, h.device)
        tile = find_tile("dropout", h.device)
        choices = {"DROPOUT": seed is not None, "ADD": factors is not None}
        n = out.numel()
        run = launch_of(_combine_kernel, h.device, (-(-n // tile["SIZE"]), 1, 1), (n,), tile, **choices)
        run((added, out, h.factor, w.factor, *(factors or (out, out))), (*mask, s * scale))
        return out
    product(h, w.T, s, out)
    return out if seed is None else dropout(out, p, seed, out=out)


@triton.jit(do_not_specialize=MASK)
def _combine_kernel(
    added, out, h_factor, w_factor, first, second, n, low, high, least_kept, s,
    DROPOUT: tl.constexpr, ADD: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """SIZE elements of s `added`, or its dropout, plus what is there, each times its two powers of two."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = take_out(tl.load(added + i, mask=i < n, other=0.0), h_factor, w_factor) * s
    if DROPOUT:
        total = tl.where(is_kept(i, low, high, least_kept), total, 0.0)
    if ADD:
        total += take_out(tl.load(out + i, mask=i < n, other=0.0), first, second)
    tl.store(out + i, total, mask=i < n)


@lru_cache(MAX_LAUNCHES)
def _up(device: torch.device, tile: Tile, numbers: tuple[int, ...], dropout: bool, half: bool, adds: bool) -> Launch:
    m, n, r, *_ = numbers
    grid = -(-n // tile["N"]), -(-m // tile["M"]), 1
    constants: Any = {"DROPOUT": dropout, "HALF": half, "ADD": adds, "R": rank_tile(r)}
    return Launch(_up_kernel, device, grid, numbers, tile, fuse=True, **constants)


def lora_gradients(
    grad_xa: Tensor | Half, x: Tensor | Half, grad_a: Tensor, xa: Tensor | Half, grad: Tensor | Half, grad_b: Tensor,
    s: float, p: float = 0.0, seed: Tensor | None = None,
) -> None:  # fmt: skip
    """Write grad_xa^T drop(x) to `grad_a` [r, k] and s grad^T xa to `grad_b` [n, r], of any strides and float type.

    grad_xa and xa are [m, r], x is [m, k], grad [m, n].
    """
    m, k = x.shape
    n, r = grad_b.shape
    tile = _tile("lora_gradients", x, m, r)
    if not tile:
        grad_a.copy_(product(grad_xa.T, _dropped(x, p, seed)))
        grad_b.copy_(product(grad.T, xa, s))
        return
    mask, scale = dropout_arguments(p, seed, x.device)
    numbers = (m, k, n, r, *grad_a.stride(), *grad_b.stride()[::-1])
    run = _gradients(x.device, tile, numbers, seed is not None, isinstance(x, Half))
    factors = [_parts(each) for each in (grad_xa, x, xa, grad)]
    of_grad_xa, of_x, of_xa, of_grad = (each.values.contiguous() for each in factors)
    tensors = of_grad_xa, of_x, grad_a, of_xa, of_grad, grad_b, run.memory(of_xa), *(each.factor for each in factors)
    run(tensors, (*mask, scale, float(s)))  # `Launch` keeps the kernel, and Triton compiles another one for an int


@lru_cache(MAX_LAUNCHES)
def _gradients(device: torch.device, tile: Tile, numbers: tuple[int, ...], dropout: bool, half: bool) -> Launch:
    m, k, n, r, *_ = numbers
    rank = rank_tile(r)
    grid = -(-k // tile["N"]) + -(-n // tile["N"]), -(-r // rank)
    steps = -(-m // tile["M"])
    constants: Any = {"DROPOUT": dropout, "HALF": half, "R": rank}
    return shared_launch(_gradients_kernel, device, grid, numbers, tile, steps, rank * tile["N"], **constants)


def _parts(x: Tensor | Half) -> Half:
    """The two tensors that a kernel gets; it reads no factor of a plain tensor."""
    return x if isinstance(x, Half) else Half(x, x)


def in_16_bits(x: Tensor | Half) -> bool:
    return isinstance(x, Half) or x.dtype != torch.float32


def _tile(kernel: str, x: Tensor | Half, m: int, r: int) -> Tile:
    if not m or not r or not in_16_bits(x):
        return NO_TILE
    return find_tile(kernel, x.device, m)


def rank_tile(r: int) -> int:
    """Ranks per program: a power of two, at least the 16 that tensor cores take, at most 64 for the registers."""
    return min(max(16, int(triton.next_power_of_2(r))), 64)


def _dropped(x: Tensor | Half, p: float, seed: Tensor | None) -> Any:
    """drop(x) in a buffer of the stream, or x itself without a seed."""
    if seed is None:
        return x
    if isinstance(x, Half):  # values divided by 1 - p could pass the end of fp16: the factor is
        values = x.values.contiguous()
        return Half(dropout(values, p, seed, torch.empty_like(values), scales=False), x.factor / (1 - p))
    x = x.contiguous()
    return dropout(x, p, seed, out=scratch(x.numel(), x.dtype, x.device, "dropped").view(x.shape))
