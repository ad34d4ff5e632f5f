"""Float weight to 4-bit bytes, and back, in one launch; the scales to 8-bit codes in another.

    absmax[b] = max |w| over block b          code[i] = nearest level of w[i] / absmax[b]
    code8[b] = nearest level8 of (absmax[b] - mean) / nested[b // 256],     nested = max |absmax - mean| of 256 blocks

    w[i] = level[code[i]] * scale[i // block_size]
    scale[b] = level8[code8[b]] * nested[b // 256] + offset        (stored in fp32 without double quantization)

The bytes equal those of `quantization/blockwise.py`, where their layout stands. This needs exact division (div_rn), a
reciprocal for whole blocks and a division for a short last one, and the grid of 65,536 points for the 8-bit codes. As
in bitsandbytes, every product and sum is rounded to fp32 (no FMA: `fuse=False`, the default of `Launch`), and a decoded
weight once more to the output type.
"""

from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels.triton.launch import MAX_LAUNCHES, Launch, Tile, find_tile
from lightning_qlora.quantization.blockwise import NESTED_BLOCK_SIZE, SMALLEST_SCALE, code_of_place, mean_in_fixed_order
from lightning_qlora.quantization.codebooks import codebook, dynamic_map
from lightning_qlora.quantization.packed_weight import PackedBytes, aligned


@triton.jit
def _quantize_kernel(
    weight,
    packed,
    absmax,
    bounds,
    order,
    n,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SMALLEST: tl.constexpr,
    SORTED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A program quantizes BLOCKS blocks of BLOCK weights; two neighbours share a byte, the first in the high half."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(weight + i, mask=i < n, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=1)
    # A tensor, because Triton 3.4 makes a number this small (subnormal in fp32) an fp64.
    divisor = tl.maximum(largest, tl.full((BLOCKS,), SMALLEST, tl.float32))
    scaled = values * tl.div_rn(1.0, divisor)[:, None]
    if not WHOLE:
        short = (block + 1) * BLOCK > n
        scaled = tl.where(short[:, None], tl.div_rn(values, divisor[:, None]), scaled)
        largest = tl.where(short, divisor, largest)
    tl.store(absmax + block, largest, mask=block * BLOCK < n)
    rank = tl.zeros((BLOCKS, BLOCK), tl.int32)
    for step in tl.static_range(15):
        rank += (scaled > tl.load(bounds + step)).to(tl.int32)
    if SORTED:
        code = rank
    else:
        table = tl.load(order + tl.arange(0, 16)).to(tl.int32)
        code = tl.reshape(tl.gather(table, tl.reshape(rank, (BLOCKS * BLOCK,)), 0), (BLOCKS, BLOCK))
    first, second = tl.split(tl.reshape(code, (BLOCKS, BLOCK // 2, 2)))
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(packed + byte, (first << 4 | second).to(tl.uint8), mask=byte * 2 < n)


@triton.jit
def _nest_kernel(absmax, mean, codes, nested, code_at, n, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """A program turns BLOCKS x 256 scales into 8-bit codes and BLOCKS second-level scales."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    centred = tl.where(i < n, tl.load(absmax + i, mask=i < n, other=0.0) - tl.load(mean), 0.0)
    largest = tl.max(tl.abs(centred), axis=1)
    tl.store(nested + block, largest, mask=block * BLOCK < n)
    inverse = tl.div_rn(1.0, tl.where(largest == 0, 1.0, largest))
    scaled = tl.minimum(tl.maximum(centred * inverse[:, None], -1.0), 1.0)
    place = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).to(tl.int32)
    code = tl.load(code_at + tl.minimum(place, 65535))
    tl.store(codes + i, tl.where(largest[:, None] == 0, 0, code), mask=i < n)


def quantize(weight: Tensor, quant_type: QuantType, block_size: int, double_quant: bool) -> PackedBytes:
    """See `reference.quantize`; it does not wait for the device."""
    device = weight.device
    flat = weight.reshape(-1)
    n = flat.numel()
    book = codebook(quant_type, str(device))
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    tile = find_tile("quantize", device, block_size)
    blocks = tile["WEIGHTS"] // block_size
    launch = Launch(
        _quantize_kernel,
        device,
        (-(-absmax.numel() // blocks), 1, 1),
        (n,),
        tile,
        BLOCK=block_size,
        BLOCKS=blocks,
        SMALLEST=SMALLEST_SCALE,
        SORTED=book.in_order,
        WHOLE=n % block_size == 0,
    )
    launch((flat, packed, absmax, book.bounds, book.order))
    if double_quant:
        scales, nested = _nest(absmax)
    else:
        scales = absmax
        nested = absmax.new_empty(0)
    shape = (weight.shape[0], weight.shape[1])
    return PackedBytes(packed, scales.view(torch.uint8), nested.view(torch.uint8), shape, quant_type, block_size)


def _nest(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Scales fp32 [b] -> codes uint8 [b], and second-level scales with the mean last, fp32 [ceil(b / 256) + 1]."""
    b = absmax.numel()
    device = absmax.device
    codes = torch.empty(b, dtype=torch.uint8, device=device)
    blocks = -(-b // NESTED_BLOCK_SIZE)
    nested = torch.empty(blocks + 1, dtype=torch.float32, device=device)
    nested[-1] = mean_in_fixed_order(absmax)
    tile = find_tile("nest", device)
    launch = Launch(_nest_kernel, device, (-(-blocks // tile["BLOCKS"]), 1, 1), (b,), tile, BLOCK=NESTED_BLOCK_SIZE)
    launch((absmax, nested[-1:], codes, nested, code_of_place(str(device))))
    return codes, nested


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
    packed,
    absmax,
    nested,
    levels8,
    levels,
    out,
    n_nested,
    n,
    RUN: tl.constexpr,
    RUNS_PER_BLOCK: tl.constexpr,
    RUNS: tl.constexpr,
    WORDS: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
):
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
    return dynamic_map(device=str(device)), codebook(quant_type, str(device)).levels


def weight_arguments(weight: PackedBytes) -> tuple[tuple[Tensor, ...], bool]:
    """The bytes of a 4-bit weight as kernels read them, and whether they are aligned: packed, absmax and nested."""
    packed, absmax, nested, *_ = weight
    if not (packed.is_contiguous() and absmax.is_contiguous() and nested.is_contiguous()):
        packed, absmax, nested = packed.contiguous(), absmax.contiguous(), nested.contiguous()
    places = absmax.data_ptr() | nested.data_ptr()
    if places & 3:  # FSDP cut them out of a larger tensor; one of them is fp32
        absmax, nested = aligned(absmax), aligned(nested)
    is_aligned = not (packed.data_ptr() | places) & 15
    return (packed, absmax, nested), is_aligned


def dequantize_into(out: Tensor, weight: PackedBytes, tile: Tile | None = None) -> Tensor:
    """Decode into `out`, contiguous [numel] or [out, in], of any of the three float types; returns it."""
    bytes, is_aligned = weight_arguments(weight)
    has_words = is_aligned or bytes[0].data_ptr() % 4 == 0
    tile = tile or find_tile("dequantize", out.device)
    form = weight.quant_type, weight.block_size, bytes[2].numel()
    launch, tables = _launch_of_dequantize(out.device, tile, out.dtype, out.numel(), *form, has_words)
    run = launch.aligned if is_aligned else launch
    run((*bytes, *tables, out))
    return out


@lru_cache(MAX_LAUNCHES)
def _launch_of_dequantize(
    device: torch.device,
    tile: Tile,
    dtype: torch.dtype,
    n: int,
    quant_type: QuantType,
    block_size: int,
    nested_bytes: int,
    has_words: bool,
) -> tuple[Launch, tuple[Tensor, Tensor]]:
    """With the tables of levels, which its kernel reads too."""
    n_nested = place_of_offset(nested_bytes)
    run = min(block_size, 64)  # a longer block is several runs, so that one tile fits all block sizes
    words = has_words and n % run == 0
    runs = tile["WEIGHTS"] // run
    if not words:
        runs //= 4  # reading single bytes takes more registers per weight
    launch = Launch(
        _dequantize_kernel,
        device,
        (-(-n // (runs * run)), 1, 1),
        (n_nested, n),
        tile,
        RUN=run,
        RUNS_PER_BLOCK=block_size // run,
        RUNS=runs,
        WORDS=words,
        DOUBLE_QUANT=n_nested >= 0,
    )
    return launch, tables_of_levels(quant_type, device)


def place_of_offset(nested_bytes: int) -> int:
    """That in the second-level scales; -1 without double quantization."""
    return nested_bytes // 4 - 1


def dequantize(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    out = torch.empty(weight.numel, dtype=dtype, device=weight.packed.device)
    return dequantize_into(out, weight).view(weight.shape)
