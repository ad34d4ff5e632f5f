"""Float weight to 4-bit bytes in one launch, and the scales to 8-bit codes in another.

    absmax[b] = max |w| over block b          code[i] = nearest level of w[i] / absmax[b]
    code8[b] = nearest level8 of (absmax[b] - mean) / nested[b // 256],     nested = max |absmax - mean| of 256 blocks

The results equal `quantization/blockwise.py` bit for bit. This needs exact division (div_rn), a reciprocal for whole
blocks and a division for a short last one, the grid of 65,536 points for the 8-bit codes, and no FMA (the default of
`Launch`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels.triton.launch import Launch
from lightning_qlora.kernels.triton.tiles import find_tile
from lightning_qlora.quantization.blockwise import NESTED_BLOCK_SIZE, SMALLEST_SCALE, code_of_place, mean_in_fixed_order
from lightning_qlora.quantization.codebooks import codebook
from lightning_qlora.quantization.packed_weight import PackedBytes


@triton.jit
def _quantize_kernel(
    weight, packed, absmax, bounds, order, n,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SMALLEST: tl.constexpr, SORTED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
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
    device, flat = weight.device, weight.detach().reshape(-1)
    n, book = flat.numel(), codebook(quant_type, str(device))
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=device)
    tile = find_tile("quantize", device, block_size)
    blocks = tile["WEIGHTS"] // block_size
    launch = Launch(
        _quantize_kernel, device, (-(-absmax.numel() // blocks), 1, 1), (n,), tile, BLOCK=block_size, BLOCKS=blocks,
        SMALLEST=SMALLEST_SCALE, SORTED=book.in_order, WHOLE=n % block_size == 0,
    )  # fmt: skip
    launch((flat, packed, absmax, book.bounds, book.order))
    scales, nested = _nest(absmax) if double_quant else (absmax, absmax.new_empty(0))
    shape = (weight.shape[0], weight.shape[1])
    return PackedBytes(packed, scales.view(torch.uint8), nested.view(torch.uint8), shape, quant_type, block_size)


def _nest(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Scales fp32 [b] -> codes uint8 [b], and second-level scales with the mean last, fp32 [ceil(b / 256) + 1]."""
    b, device = absmax.numel(), absmax.device
    codes = torch.empty(b, dtype=torch.uint8, device=device)
    blocks = -(-b // NESTED_BLOCK_SIZE)
    nested = torch.empty(blocks + 1, dtype=torch.float32, device=device)
    nested[-1] = mean_in_fixed_order(absmax)
    tile = find_tile("nest", device)
    launch = Launch(_nest_kernel, device, (-(-blocks // tile["BLOCKS"]), 1, 1), (b,), tile, BLOCK=NESTED_BLOCK_SIZE)
    launch((absmax, nested[-1:], codes, nested, code_of_place(str(device))))
    return codes, nested
