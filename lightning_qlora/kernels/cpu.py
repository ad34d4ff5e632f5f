"""The eager path: decode piece by piece into a reused buffer, then torch's own matrix product; any device.

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


def dequantize(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    """The decoded weight in fresh memory, [out, in]."""
    return dequantize_into(torch.empty(weight.numel, dtype=dtype, device=weight.packed.device), weight).view(
        weight.shape
    )


def _decoded(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    return dequantize_into(scratch(weight.numel, dtype, weight.packed.device), weight).view(weight.shape)


def linear(
    x: Tensor, weight: PackedBytes, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `reference.linear`. The adapter's product comes first: the big product adds itself to it (beta = 1)."""
    xa = reference.dropout(x, p, seed) @ lora_a.to(x.dtype).T
    y = (xa @ lora_b.to(x.dtype).T).mul_(scaling)
    if bias is not None:
        y += bias.to(x.dtype)
    return y.addmm_(x, _decoded(weight, x.dtype).T), xa


def linear_backward(
    grad: Tensor, x: Tensor, xa: Tensor, weight: PackedBytes, lora_a: Tensor, lora_b: Tensor, scaling: float,
    p: float, seed: Tensor | None, needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """See `reference.linear_backward`."""
    grad_xa = (grad @ lora_b.to(grad.dtype)).mul_(scaling)
    grad_b = (grad.T @ xa).mul_(scaling).to(lora_b.dtype)
    grad_a = (grad_xa.T @ reference.dropout(x, p, seed)).to(lora_a.dtype)
    if not needs_x:
        return None, grad_a, grad_b
    grad_x = reference.dropout(grad_xa @ lora_a.to(grad.dtype), p, seed)
    return grad_x.addmm_(grad, _decoded(weight, grad.dtype)), grad_a, grad_b
