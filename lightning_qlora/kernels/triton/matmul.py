"""x W^T with W decoded inside the product, for few rows of x: W is read as 4 bits and never written.

    y^T[n, m] += bias[n] + sum over runs of k:  scale[n, run] * (sum over k in the run:  level[code[n, k]] * x[m, k])

The scale is constant over a run, so it multiplies the sum of the run, and the tensor cores multiply levels (rounded to
the 16-bit type of x). W is the left operand, which Hopper can read from registers. The runs are shared by several
programs (`shares.py`).
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.triton.dequantize import levels_of_codes, load_scales, weight_arguments
from lightning_qlora.kernels.triton.launch import MAX_LAUNCHES, Launch
from lightning_qlora.kernels.triton.shares import add_shares, number_of_shares, number_of_sums, share_memory
from lightning_qlora.kernels.triton.tiles import Tile, find_tile
from lightning_qlora.quantization.packed_weight import PackedBytes


@triton.jit
def _matmul_kernel(
    packed, absmax, nested, levels8, levels, x, bias, y, memory, n_nested, m, n, k, shares,
    BLOCK_SIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, BIAS: tl.constexpr, RUN: tl.constexpr, SPLIT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program computes N x M sums over its share of the runs of RUN weights."""
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)  # of W
    column = tl.program_id(1) * M + tl.arange(0, M)  # of x^T
    share = tl.program_id(2)
    bytes_of_row = packed + row[:, None] * tl.multiple_of(k // 2, RUN // 2) + tl.arange(0, RUN // 2)[None, :]
    inputs_of_row = x + column.to(tl.int64)[:, None] * k + tl.arange(0, RUN)[None, :]
    table = tl.load(levels + tl.arange(0, 16))
    total = tl.zeros((N, M), tl.float32)
    runs = tl.cdiv(k // RUN, shares)
    for run in tl.range(share * runs, tl.minimum((share + 1) * runs, k // RUN)):
        codes = tl.load(bytes_of_row + run * (RUN // 2), mask=row[:, None] < n, other=0)
        level = levels_of_codes(codes, table, N, RUN).to(x.dtype.element_ty)
        inputs = tl.load(inputs_of_row + run * RUN, mask=column[:, None] < m, other=0.0)
        block = (row * k + run * RUN) // BLOCK_SIZE
        scales = load_scales(absmax, nested, n_nested, levels8, block, row < n, DOUBLE_QUANT)
        total += tl.dot(level, inputs.T) * scales[:, None]
    write = (row < n)[:, None] & (column < m)[None, :]
    if SPLIT:
        total, is_last = add_shares(total, memory, share, shares, N, M)
        write &= is_last
    place = y + column.to(tl.int64)[None, :] * n + row[:, None]
    total += tl.load(place, mask=write, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
    tl.store(place, total.to(y.dtype.element_ty), mask=write)


def can_add_matmul(x: Tensor, weight: PackedBytes) -> bool:
    """Whether `add_matmul_` can compute x W^T, x [m, k], and the table of tiles says that it is fast."""
    whole_runs = weight.shape[1] % min(weight.block_size, 64) == 0
    return whole_runs and x.dtype != torch.float32 and x.numel() > 0 and bool(find_tile("matmul", x.device, x.shape[0]))


def add_matmul_(y: Tensor, x: Tensor, weight: PackedBytes, bias: Tensor | None = None) -> Tensor:
    """y += x W^T + bias, rounded once; y [m, n] contiguous and x [m, k] of the same 16-bit type; returns y."""
    tensors, n_nested = weight_arguments(weight)
    tile = find_tile("matmul", x.device, x.shape[0])
    run, sums = _matmul(x.device, tile, x.shape[0], weight.shape, weight.block_size, n_nested, bias is not None)
    run((*tensors, x.contiguous(), y if bias is None else bias.contiguous(), y, share_memory(sums, y)))
    return y


@lru_cache(MAX_LAUNCHES)
def _matmul(
    device: torch.device, tile: Tile, m: int, shape: tuple[int, int], block_size: int, n_nested: int, bias: bool
) -> tuple[Launch, int]:
    (n, k), run = shape, min(block_size, 64)
    columns, rows = -(-n // tile["N"]), -(-m // tile["M"])
    shares = number_of_shares(columns * rows, tile["PROGRAMS"], k // run)
    launch = Launch(
        _matmul_kernel, device, (columns, rows, shares), (n_nested, m, n, k, shares), tile, fuse=True,
        BLOCK_SIZE=block_size, DOUBLE_QUANT=n_nested >= 0, BIAS=bias, RUN=run, SPLIT=shares > 1,
    )  # fmt: skip
    return launch, number_of_sums(shares, columns * rows * tile["N"] * tile["M"])
