"""Quantize and decode with torch alone, piece by piece into reused memory; any device.

Compare `reference.py`: the same results, without its temporaries.
"""

from functools import cache

import torch
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels import reference
from lightning_qlora.kernels.scratch import scratch
from lightning_qlora.quantize import blockwise
from lightning_qlora.quantize.codebooks import codebook
from lightning_qlora.quantize.packed import PackedBytes

PIECE = 1 << 17  # weights at a time: the fp32 piece stays in the L2 cache; a multiple of every block size


def quantize(weight: Tensor, quant_type: QuantType, block_size: int, double_quant: bool) -> PackedBytes:
    """Float weight [out, in] -> 4-bit bytes; the nearest level found by counting the midpoints below (see bounds)."""
    book = codebook(quant_type, str(weight.device))
    flat = weight.detach().reshape(-1)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // block_size), dtype=torch.float32, device=weight.device)
    sorted_already = bool((book.order[1:] > book.order[:-1]).all())
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE].float()
        scales = blockwise.block_absmax(piece, block_size)
        absmax[start // block_size :][: scales.numel()] = scales
        values = blockwise.normalize(piece, scales, block_size)
        if values.numel() % 2:
            values = torch.cat([values, values.new_zeros(1)])
        codes = torch.zeros(values.shape, dtype=torch.uint8, device=weight.device)
        for bound in book.bounds.tolist():
            codes += values > bound
        packed[start // 2 :][: values.numel() // 2] = blockwise.pack(
            codes if sorted_already else book.order[codes.int()]
        )
    scales_and_nested = reference.store_scales(absmax, double_quant)
    return PackedBytes(packed, *scales_and_nested, (weight.shape[0], weight.shape[1]), quant_type, block_size)


@cache
def _levels_of_byte(quant_type: QuantType, device: str) -> Tensor:
    """The two fp32 levels of every byte, as one 8-byte number each: int64 [256]."""
    levels = codebook(quant_type, device).levels
    byte = torch.arange(256, device=levels.device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1).view(torch.int64).view(-1)


def dequantize_into(out: Tensor, weight: PackedBytes) -> Tensor:
    """Decode into `out`, flat [numel], of any of the three float types; returns it."""
    device, size = out.device, weight.block_size
    table, packed, scales = _levels_of_byte(weight.quant_type, str(device)), weight.packed.reshape(-1), weight.scales()
    for start in range(0, weight.numel, PIECE):
        numel = min(PIECE, weight.numel - start)
        index = packed[start // 2 : (start + numel + 1) // 2].int()
        pairs = scratch(index.numel(), torch.int64, device, "levels")
        values = torch.index_select(table, 0, index, out=pairs).view(torch.float32)[:numel]
        whole = numel - numel % size
        block = start // size
        values[:whole].view(-1, size).mul_(scales[block : block + whole // size, None])
        if whole < numel:
            values[whole:].mul_(scales[-1])
        out[start : start + numel].copy_(values)
    return out


def dropout_into(out: Tensor, x: Tensor, least_kept: int, scale: float, seed: int) -> Tensor:
    """See `reference.dropout`; `out` may be `x`, both contiguous."""
    source, flat = x.view(-1), out.view(-1)
    for start in range(0, flat.numel(), PIECE):
        piece = slice(start, min(start + PIECE, flat.numel()))
        keep = reference.dropout_kept(piece.start, piece.stop, least_kept, seed, x.device)
        flat[piece] = torch.where(keep, source[piece] * scale, 0)
    return out
