"""x W^T for few rows of x by tensor cores, with W decoded inside the product.

    y^T[n, m] += bias[n] + sum over runs of k:  scale[n, run] * (sum over k in the run:  level[code[n, k]] * x[m, k])

The scale is constant over a run, so it multiplies the sum of the run, and the tensor cores multiply levels (rounded to
the 16-bit type of x). W is the left operand, which Hopper can read from registers. Several programs share the runs.
"""

import torch
import triton
import triton.language as tl

from lightning_qlora.kernels.triton.launch import Launch, add_shares, find_tile, shared_launch
from lightning_qlora.kernels.triton.quantize import levels_of_codes, load_scales, place_of_offset
from lightning_qlora.quantization.packed_weight import PackedBytes


@triton.jit
def _matmul_kernel(
    packed,
    absmax,
    nested,
    levels8,
    levels,
    x,
    bias,
    y,
    memory,
    factor,
    n_nested,
    m,
    n,
    k,
    shares,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    BIAS: tl.constexpr,
    HALF: tl.constexpr,
    RUN: tl.constexpr,
    SPLIT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
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
    if HALF:
        total *= tl.load(factor + column, mask=column < m, other=1.0)[None, :]
    place = y + column.to(tl.int64)[None, :] * n + row[:, None]
    total += tl.load(place, mask=write, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
    tl.store(place, total.to(y.dtype.element_ty), mask=write)


def matmul(m: int, weight: PackedBytes, has_bias: bool, half: bool, types: tuple[torch.dtype, ...]) -> Launch:
    """Tensors: packed, absmax, nested, two tables of levels, x, bias or y, y, memory, powers of x (`half`) or y.

    `types`: of x, bias or y, and y.
    """
    device = weight.packed.device
    n, k = weight.shape
    n_nested = place_of_offset(weight.nested.numel())
    tile = find_tile("matmul", device, m)
    run = min(weight.block_size, 64)
    return shared_launch(
        _matmul_kernel,
        device,
        (-(-n // tile["N"]), -(-m // tile["M"])),
        (n_nested, m, n, k),
        tile,
        k // run,
        tile["N"] * tile["M"],
        (*[torch.uint8] * 3, *[torch.float32] * 2, *types, torch.float32, torch.float32 if half else types[-1]),
        BLOCK_SIZE=weight.block_size,
        DOUBLE_QUANT=n_nested >= 0,
        BIAS=has_bias,
        HALF=half,
        RUN=run,
    )
