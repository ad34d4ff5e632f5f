"""x W^T for one or two rows of x in fp32, without tensor cores: of cards whose tensor cores Triton does not use (T4).

    y[m, n] += bias[n] + sum over k:  level[code[n, k]] * scale[n, k // block_size] * x[m, k]

All is fp32, so nothing overflows, and x needs no power of two. W is read as 4 bits, eight codes at a time.
"""

import triton
import triton.language as tl

from lightning_qlora.kernels.triton.launch import Launch, find_tile
from lightning_qlora.kernels.triton.quantize import load_scales, place_of_offset
from lightning_qlora.quantization.packed_weight import PackedBytes


@triton.jit
def _vector_kernel(
    packed, absmax, nested, levels8, levels, x, bias, y, memory, factor, n_nested, n, k,
    BLOCK_SIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, BIAS: tl.constexpr, TWO: tl.constexpr, ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS outputs of one row of x, or of two; its sums stay in registers until the end."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of W
    word = tl.arange(0, WORDS)
    place = tl.arange(0, 8)
    first = row.to(tl.int64)[:, None] * k
    words = packed.to(tl.pointer_type(tl.int32)) + row.to(tl.int64)[:, None] * (k // 8) + word[None, :]
    inputs = x + word[:, None] * 8 + place[None, :]
    table = tl.load(levels + tl.arange(0, 16))
    total = tl.zeros((ROWS, WORDS, 8), tl.float32)
    second = tl.zeros((ROWS, WORDS, 8), tl.float32)
    for begin in tl.range(0, k, 8 * WORDS):
        column = begin + word * 8
        inside = (row < n)[:, None] & (column < k)[None, :]
        codes = tl.load(words + begin // 8, mask=inside, other=0, eviction_policy="evict_first")
        codes = (codes[:, :, None] >> ((place * 4) ^ 4)[None, None, :]) & 15  # ^ 4: the high half is first
        level = tl.reshape(tl.gather(table, tl.reshape(codes, (ROWS * WORDS * 8,)), 0), (ROWS, WORDS, 8))
        block = (first + column[None, :]) // BLOCK_SIZE
        weight = level * load_scales(absmax, nested, n_nested, levels8, block, inside, DOUBLE_QUANT)[:, :, None]
        total += weight * tl.load(inputs + begin, mask=(column < k)[:, None], other=0.0)[None, :, :]
        if TWO:
            second += weight * tl.load(inputs + k + begin, mask=(column < k)[:, None], other=0.0)[None, :, :]
    _add(total, y + row, bias + row, row < n, BIAS)
    if TWO:
        _add(second, y + n + row, bias + row, row < n, BIAS)


@triton.jit
def _add(total, at, bias, mask, BIAS: tl.constexpr):
    total = tl.sum(tl.sum(total, 2), 1) + tl.load(at, mask=mask, other=0.0)
    if BIAS:
        total += tl.load(bias, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, total, mask=mask)


def vector(m: int, weight: PackedBytes, has_bias: bool) -> Launch:
    """Tensors: those of `linear.matmul`, packed at a multiple of 4; the last two are not read."""
    device = weight.packed.device
    n, k = weight.shape
    n_nested = place_of_offset(weight.nested.numel())
    tile = find_tile("vector", device, m)
    grid = -(-n // tile["ROWS"]), 1, 1
    constants = {"BLOCK_SIZE": weight.block_size, "DOUBLE_QUANT": n_nested >= 0, "BIAS": has_bias, "TWO": m == 2}
    return Launch(_vector_kernel, device, grid, (n_nested, n, k), tile, fuse=True, **constants)
