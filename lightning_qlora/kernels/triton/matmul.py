"""x W^T with W decoded inside the product, for few rows of x: W is read as 4 bits and never written.

    y^T[n, m] = sum over runs of k:  scale[n, run] * (sum over k in the run:  level[code[n, k]] * x[m, k])

The scale is constant over a run, so it multiplies the run's sum, and levels (rounded to x's 16-bit type) are what the
tensor cores multiply. W stands on the left, where Hopper takes it from registers. Each of `splits` shares of the runs
adds up in fp32 in a place of its own, and a second kernel adds the shares in order: the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.scratch import scratch
from lightning_qlora.kernels.triton.dequantize import load_scales, scale_arguments
from lightning_qlora.kernels.triton.tiles import launch_options, launching_on
from lightning_qlora.quantize.codebooks import codebook
from lightning_qlora.quantize.packed import PackedBytes


@triton.jit
def _matmul_kernel(
    x, packed, absmax, nested, n_nested, levels8, levels, sums, m, n, k, splits,
    BLOCK_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """A program computes N x M sums over its share of the runs of RUN weights."""
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)  # of W
    column = tl.program_id(1) * M + tl.arange(0, M)  # of x^T
    share = tl.program_id(2)
    bytes_of_row = packed + row[:, None] * tl.multiple_of(k // 2, RUN // 2) + tl.arange(0, RUN // 2)[None, :]
    inputs_of_row = x + column.to(tl.int64)[:, None] * k + tl.arange(0, RUN)[None, :]
    table = tl.load(levels + tl.arange(0, 16))
    total = tl.zeros((N, M), tl.float32)
    runs = tl.cdiv(k // RUN, splits)
    for run in tl.range(share * runs, tl.minimum((share + 1) * runs, k // RUN)):
        codes = tl.load(bytes_of_row + run * (RUN // 2), mask=row[:, None] < n, other=0).to(tl.int32)
        codes = tl.reshape(tl.join(codes >> 4, codes & 15), (N * RUN,))
        level = tl.reshape(tl.gather(table, codes, 0), (N, RUN)).to(x.dtype.element_ty)
        inputs = tl.load(inputs_of_row + run * RUN, mask=column[:, None] < m, other=0.0)
        block = (row * k + run * RUN) // BLOCK_SIZE
        scales = load_scales(absmax, nested, n_nested, levels8, block, row < n)
        total += tl.dot(level, inputs.T) * scales[:, None]
    place = (share * m + column).to(tl.int64)[None, :] * n + row[:, None]
    tl.store(sums + place, total, mask=(row < n)[:, None] & (column < m)[None, :])


@triton.jit
def _add_kernel(sums, y, size, splits, SIZE: tl.constexpr):
    """y += the shares of each sum, in order."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.load(sums + i, mask=i < size, other=0.0)
    for share in range(1, splits):
        total += tl.load(sums + share * size + i, mask=i < size, other=0.0)
    before = tl.load(y + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y + i, (before + total).to(y.dtype.element_ty), mask=i < size)


def can_add_matmul(x: Tensor, weight: PackedBytes) -> bool:
    """Whether `add_matmul_` is right, and by the table of tiles fast, for x [m, k]."""
    whole_runs = weight.shape[1] % min(weight.block_size, 64) == 0
    return len(x) > 0 and x.dtype != torch.float32 and whole_runs and bool(launch_options("matmul", x.device, len(x)))


def add_matmul_(y: Tensor, x: Tensor, weight: PackedBytes) -> Tensor:
    """y += x W^T, y [m, n] contiguous and x [m, k] of the same 16-bit type; returns y."""
    (n, k), m, x, device = weight.shape, len(x), x.contiguous(), x.device
    tile = launch_options("matmul", device, m)
    run, programs = min(weight.block_size, 64), tile.pop("PROGRAMS")
    grid = (triton.cdiv(n, tile["N"]), triton.cdiv(m, tile["M"]))
    # Enough programs to fill the card, but four runs for each, lest adding up the shares cost more than it saves.
    splits = max(1, min(programs // (grid[0] * grid[1]), k // (4 * run)))
    sums = scratch(splits * m * n, torch.float32, device, "sums")
    with launching_on(device):
        _matmul_kernel[(*grid, splits)](
            x, weight.packed.reshape(-1), *scale_arguments(weight), codebook(weight.quant_type, str(device)).levels,
            sums, m, n, k, splits, BLOCK_SIZE=weight.block_size, RUN=run, enable_fp_fusion=True, **tile,
        )  # fmt: skip
        _add_kernel[(triton.cdiv(m * n, 1024),)](sums, y, m * n, splits, SIZE=1024, num_warps=4, enable_fp_fusion=False)
    return y
