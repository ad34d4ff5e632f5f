"""4-bit bytes to a float weight, in one launch.

    w[i] = level[code[i]] * scale[i // block_size]
    scale[b] = level8[code8[b]] * nested[b // 256] + offset        (stored in fp32 without double quantization)

The table of levels is an argument, so one kernel serves NF4, FP4 and INT4. As in bitsandbytes, every product and sum is
rounded to fp32 (no FMA: `fuse=False`, the default of `Launch`), and the result once more to the output type.
Layout of the bytes: `quantization/blockwise.py`. The same in torch: `kernels/reference.py`.
"""

from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels.triton.launch import MAX_LAUNCHES, Launch
from lightning_qlora.kernels.triton.tiles import Tile, find_tile
from lightning_qlora.quantization.codebooks import codebook, dynamic_map
from lightning_qlora.quantization.packed_weight import PackedBytes, aligned


@triton.jit
def load_scales(absmax, nested, n_nested, levels8, block, mask, DOUBLE_QUANT: tl.constexpr):
    """The fp32 scales of blocks, from their 8-bit codes or their four bytes; the offset is at nested[n_nested]."""
    if DOUBLE_QUANT:
        nested = nested.to(tl.pointer_type(tl.float32))
        level8 = tl.load(levels8 + tl.load(absmax + block, mask=mask, other=0).to(tl.int32))
        scales = level8 * tl.load(nested + block // 256, mask=mask, other=0.0) + tl.load(nested + n_nested)
    else:
        scales = tl.load(absmax.to(tl.pointer_type(tl.float32)) + block, mask=mask, other=0.0)
    return scales


@triton.jit
def levels_of_codes(bytes, levels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The levels of two codes in each byte, the first in the high half: [ROWS, COLUMNS / 2] -> [ROWS, COLUMNS]."""
    codes = bytes.to(tl.int32)
    codes = tl.reshape(tl.join(codes >> 4, codes & 15), (ROWS * COLUMNS,))
    return tl.reshape(tl.gather(levels, codes, 0), (ROWS, COLUMNS))


@triton.jit
def _dequantize_kernel(
    packed, absmax, nested, levels8, levels, out, n_nested, n,
    RUN: tl.constexpr, RUNS_PER_BLOCK: tl.constexpr, RUNS: tl.constexpr, WORDS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):  # fmt: skip
    """A program decodes RUNS runs of RUN weights with one scale per run, and reads eight codes at a time as an int32.

    Threads load and store 16 bytes at a time. Between threads only the words are exchanged, which are smaller than the
    decoded weights.
    """
    UNIT: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth  # weights per 16-byte store
    first = tl.program_id(0).to(tl.int64) * RUNS * RUN  # the only 64-bit index: the others are offsets in 32 bits
    left = tl.minimum(n - first, RUNS * RUN).to(tl.int32)
    run = tl.arange(0, RUNS)
    begins = run * RUN < left
    block = (first // RUN + run) // RUNS_PER_BLOCK
    scales = load_scales(absmax, nested, n_nested, levels8, block, begins, DOUBLE_QUANT)
    word = run[:, None] * (RUN // 8) + tl.arange(0, RUN // 8)[None, :]
    place = tl.arange(0, UNIT)
    unit = run[:, None] * (RUN // UNIT) + tl.arange(0, RUN // UNIT)[None, :]
    weight = unit[:, :, None] * UNIT + place[None, None, :]
    if WORDS:
        mask = begins[:, None, None]
        words = packed.to(tl.pointer_type(tl.int32)) + first // 8 + word
        words = tl.load(words, mask=begins[:, None], other=0, eviction_policy="evict_first")
        # Eight codes make 8 / UNIT units: repeat the word for each unit and shift the unit's codes to the low bits.
        words = words[:, :, None] >> (tl.arange(0, 8 // UNIT) * 4 * UNIT)[None, None, :]
        words = tl.reshape(words, (RUNS, RUN // UNIT, 1))
        codes = (words >> ((place * 4) ^ 4)[None, None, :]) & 15  # ^ 4: the first code is the high half of a byte
    else:  # the last run is not complete, or the address of the bytes is no multiple of 4
        mask = weight < left
        bytes = tl.load(packed + first // 2 + weight // 2, mask=mask, other=0).to(tl.int32)
        codes = (bytes >> ((place % 2 * 4) ^ 4)[None, None, :]) & 15
    level = tl.gather(tl.load(levels + tl.arange(0, 16)), tl.reshape(codes, (RUNS * RUN,)), 0)
    weights = tl.reshape(level, (RUNS, RUN // UNIT, UNIT)) * scales[:, None, None]
    tl.store(out + first + weight, weights.to(out.dtype.element_ty), mask=mask)


@cache
def tables_of_levels(quant_type: QuantType, device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels of 8-bit scales and of 4-bit codes, on the device."""
    return dynamic_map(device=str(device)), codebook(quant_type, str(device)).levels


def weight_arguments(weight: PackedBytes) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], int]:
    """What a kernel reads of a 4-bit weight: packed, absmax, nested, levels8, levels, and the place of the offset.

    The place of the offset in `nested` is -1 without double quantization.
    """
    packed, absmax, nested = weight.packed, weight.absmax, weight.nested
    if not packed.is_contiguous():
        packed = packed.contiguous()
    n_nested = nested.numel() // 4 - 1
    if n_nested >= 0:
        nested = aligned(nested)
        absmax = absmax if absmax.is_contiguous() else absmax.contiguous()
    else:
        absmax = aligned(absmax)
    tables = tables_of_levels(weight.quant_type, packed.device)
    return (packed, absmax, nested, *tables), n_nested


def dequantize_into(out: Tensor, weight: PackedBytes) -> Tensor:
    """Decode into `out`, flat [numel], of any of the three float types; returns it."""
    tensors, n_nested = weight_arguments(weight)
    aligned = tensors[0].data_ptr() % 4 == 0
    tile = find_tile("dequantize", out.device)
    _launch(out.device, tile, weight.numel, weight.block_size, n_nested, aligned)((*tensors, out))
    return out


@lru_cache(MAX_LAUNCHES)
def _launch(device: torch.device, tile: Tile, n: int, block_size: int, n_nested: int, aligned: bool) -> Launch:
    run = min(block_size, 64)  # a longer block is several runs, so that one tile fits all block sizes
    words = aligned and n % run == 0
    runs = tile["WEIGHTS"] // run
    if not words:
        runs //= 4  # reading single bytes takes more registers per weight
    return Launch(
        _dequantize_kernel, device, (-(-n // (runs * run)), 1, 1), (n_nested, n), tile, RUN=run,
        RUNS_PER_BLOCK=block_size // run, RUNS=runs, WORDS=words, DOUBLE_QUANT=n_nested >= 0,
    )  # fmt: skip


def dequantize(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    """See `reference.dequantize`."""
    out = torch.empty(weight.numel, dtype=dtype, device=weight.packed.device)
    return dequantize_into(out, weight).view(weight.shape)
