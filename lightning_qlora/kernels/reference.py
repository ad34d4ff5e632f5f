"""Every op in a few lines of torch: the specification that all backends are tested against.

**One rounding.** The output and dX of a layer are sums in fp32 that are rounded once. A backend may round the adapter's
part before, since that error is small as the part is, but never x W^T or the bias before the adapter's part is in:

    round(round(x W^T) + d) = round(x W^T)      for every |d| below half of the last bit of x W^T

So a small adapter would add nothing, in every step. With one rounding d moves the sum to the next number with a
probability proportional to d, and its mean arrives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.quantization import blockwise
from lightning_qlora.quantization.codebooks import codebook
from lightning_qlora.quantization.packed_weight import PackedBytes


def quantize(weight: Tensor, quant_type: QuantType, block_size: int, double_quant: bool) -> PackedBytes:
    """Float weight [out, in] -> 4-bit bytes."""
    packed, absmax = blockwise.quantize_4bit(weight, codebook(quant_type, str(weight.device)), block_size)
    shape = (weight.shape[0], weight.shape[1])
    if not double_quant:
        return PackedBytes(packed, absmax.view(torch.uint8), packed.new_empty(0), shape, quant_type, block_size)
    codes, nested_absmax, offset = blockwise.double_quantize(absmax)
    return PackedBytes(packed, codes, blockwise.nested_bytes(nested_absmax, offset), shape, quant_type, block_size)


def dequantize(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    """W = level[code] * scale, rounded to fp32 and then to `dtype`; [out, in]."""
    return weight.dequantize_into(weight.packed.new_empty(weight.numel, dtype=dtype)).view(weight.shape)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Dropout: each element of x is kept with probability 1 - p and then divided by 1 - p; without a seed, x itself.

    A hash of the seed and the element's index decides, so the mask is the same on all devices and for any number of
    threads.
    """
    if seed is None:
        return x
    keep = dropout_kept(0, x.numel(), p, seed, x.device)
    return torch.where(keep.view(x.shape), x * dropout_threshold(p)[1], 0)


def dropout_kept(start: int, stop: int, p: float, seed: Tensor, device: torch.device) -> Tensor:
    """Which of the elements start to stop (flat indices) of x are kept: bool [stop - start]."""
    number = int(seed.item())
    index = torch.arange(start, stop, device=device).to(torch.int32)
    word = mix(mix(index + as_int32(number)) ^ as_int32(number >> 32))
    return word >= dropout_threshold(p)[0]


def dropout_threshold(p: float) -> tuple[int, float]:
    """The smallest hash, an int32, of an element that is kept, and the factor 1 / (1 - p)."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31, 1 / (1 - p)


def mix(h: Tensor) -> Tensor:
    """A 32-bit hash: each input bit changes each output bit with probability 1/2 (Wellons, lowbias32)."""
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D  # the mask turns it into an unsigned shift
    h = (h ^ ((h >> 15) & 0x1FFFF)) * as_int32(0x846CA68B)
    return h ^ ((h >> 16) & 0xFFFF)


def as_int32(word: int) -> int:
    """The low 32 bits of an integer, as an int32."""
    return ((word + 2**31) & 0xFFFFFFFF) - 2**31


def lora_project(x: Tensor, lora_a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """drop(X) A^T: [m, in] -> [m, r], with A [r, in]."""
    return _product(dropout(x, p, seed), lora_a.to(x.dtype).T).to(x.dtype)


def linear_into(
    out: Tensor, x: Tensor, xa: Tensor, weight: PackedBytes, bias: Tensor | None, lora_b: Tensor, scaling: float
) -> None:
    """Y = X W^T + s xa B^T + bias, written to `out`: X [m, in], xa = drop(X) A^T [m, r], B [out, r] -> Y [m, out]."""
    y = _product(x, dequantize(weight, x.dtype).T) + scaling * _product(xa, lora_b.to(x.dtype).T)
    out.copy_(y if bias is None else y + bias)


def linear_backward(
    grad: Tensor, x: Tensor, xa: Tensor, weight: PackedBytes, lora_a: Tensor, lora_b: Tensor, scaling: float,
    p: float, seed: Tensor | None, needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """The gradients of X [m, in], A [r, in] and B [out, r] from dY [m, out]; that of X only if needed.

    dB = s dY^T xa;  dA = s (dY B)^T drop(X);  dX = dY W + s drop(dY B A), with the mask of the forward pass.
    """
    grad_xa, grad_a, grad_b = _adapter_gradients(grad, dropout(x, p, seed), xa, lora_a, lora_b, scaling)
    if not needs_x:
        return None, grad_a, grad_b
    added = dropout(_product(grad_xa, lora_a.to(grad.dtype)), p, seed)
    return (_product(grad, dequantize(weight, grad.dtype)) + added).to(grad.dtype), grad_a, grad_b


def _adapter_gradients(
    grad: Tensor, dropped: Tensor, xa: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """s dY B [m, r], and the gradients of A and B."""
    grad_xa = (scaling * _product(grad, lora_b.to(grad.dtype))).to(grad.dtype)
    grad_b = (scaling * _product(grad.T, xa)).to(lora_b.dtype)
    return grad_xa, _product(grad_xa.T, dropped).to(lora_a.dtype), grad_b


def grouped_linear(
    x: Tensor, ends: Tensor, weights: Sequence[PackedBytes], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scaling: float, p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The layers of several experts: rows ends[e - 1] to ends[e] of X go through layer e; Y, and drop(X) A^T.

    Rows from the last end on belong to no expert and give zeros. X [m, in], ends int32 [experts], lists by expert.
    """
    y, xa, dropped = x.new_zeros(len(x), weights[0].shape[0]), x.new_zeros(len(x), len(lora_a[0])), dropout(x, p, seed)
    for rows, weight, a, b in zip(_groups(ends), weights, lora_a, lora_b, strict=True):
        xa[rows] = lora_project(dropped[rows], a, 0.0, None)
        linear_into(y[rows], x[rows], xa[rows], weight, None, b, scaling)
    return y, xa


def grouped_linear_backward(
    grad: Tensor, x: Tensor, xa: Tensor, ends: Tensor, weights: Sequence[PackedBytes], lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor], scaling: float, p: float, seed: Tensor | None, needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """The gradients of X, of every A [experts, r, in] and of every B [experts, out, r]; see `linear_backward`."""
    total, dropped = torch.zeros_like(x, dtype=torch.float32), dropout(x, p, seed)
    grads_a, grads_b = list[Tensor](), list[Tensor]()
    for rows, a, b in zip(_groups(ends), lora_a, lora_b, strict=True):
        grad_xa, grad_a, grad_b = _adapter_gradients(grad[rows], dropped[rows], xa[rows], a, b, scaling)
        grads_a.append(grad_a)
        grads_b.append(grad_b)
        total[rows] = _product(grad_xa, a.to(grad.dtype))
    total = dropout(total, p, seed)  # its mask depends on the index among all rows
    for rows, weight in zip(_groups(ends), weights, strict=True):
        total[rows] += _product(grad[rows], dequantize(weight, grad.dtype))
    return total.to(grad.dtype) if needs_x else None, torch.stack(grads_a), torch.stack(grads_b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 (fp64 of fp64): not rounded to 16 bits."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) @ b.to(dtype)


def _groups(ends: Tensor) -> list[slice]:
    numbers = ends.tolist()
    return [slice(begin, end) for begin, end in zip([0, *numbers], numbers, strict=False)]
