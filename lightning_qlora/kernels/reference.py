"""Every op in a few lines of torch: the specification that all backends are tested against.

**One rounding.** The output and dX of a layer are sums in fp32 that are rounded once. A backend may round the adapter's
part before, since that error is small as the part is, and the sum before the bias, but never x W^T or the bias before
the adapter's part is in:

    round(round(x W^T) + d) = round(x W^T)      for every |d| below half of the last bit of x W^T

So a small adapter would add nothing, in every step. With one rounding d moves the sum to the next number with a
probability proportional to d, and its mean arrives.

An input is a tensor, or a `Half`, whose product is an fp32 tensor. x or dY in fp32 that products take in 16 bits is a
`Wide`, and y and dX are not rounded then.
"""

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels import half
from lightning_qlora.kernels.half import Half, Wide, scaled_weight
from lightning_qlora.kernels.half import take_out as take_out
from lightning_qlora.kernels.half import to_half as to_half
from lightning_qlora.kernels.lora import LoRA
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


@lru_cache(64)
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


def rows_to_half(x: Tensor, times: Tensor | None = None, p: float = 0.0, seed: Tensor | None = None) -> Half:
    """See `half.rows_to_half`; with a seed also its dropout."""
    rows = half.rows_to_half(x, times)
    if seed is None:
        return rows
    keep = dropout_kept(0, x.numel(), p, seed, x.device)
    kept = torch.where(keep.view(x.shape), rows.values, 0)
    return rows._replace(dropped=Half(kept, rows.factor * dropout_threshold(p)[1]))


def lora_project(x: Tensor | Half | Wide, lora: LoRA) -> Tensor:
    """drop(X) A^T: [m, in] -> [m, r], with A [r, in]."""
    rows = _cast(x)
    return _rounded(_product(_dropped(rows, lora), lora.a.T), rows)


def linear_into(
    out: Tensor, x: Tensor | Half | Wide, xa: Tensor, weight: PackedBytes, bias: Tensor | None, lora: LoRA
) -> None:
    """Y = X W^T + s xa B^T + bias, written to `out`: X [m, in], xa = drop(X) A^T [m, r], B [out, r] -> Y [m, out]."""
    rows = _cast(x)
    y = _product(rows, _decoded(weight, rows).T) + lora.scaling * _product(xa, lora.b.T)
    if bias is not None:
        y = y + bias
    out.copy_(y)


def linear_backward(
    grad: Tensor | Half | Wide, x: Tensor | Half, xa: Tensor, weight: PackedBytes, lora: LoRA, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of X [m, in], A [r, in] and B [out, r] from dY [m, out]; that of X only if needed.

    dB = s dY^T xa;  dA = s (dY B)^T drop(X);  dX = dY W + s drop(dY B A), with the mask of the forward pass.
    """
    if isinstance(grad, Wide):
        x = cast(Tensor, x).to(grad.cast.dtype)
    factor = _cast(grad)
    added, grad_a, grad_b = adapter_backward(factor, x, xa, lora)
    if not needs_x:
        return None, grad_a, grad_b
    grad_x = _product(factor, _decoded(weight, factor)) + added
    return grad_x if isinstance(grad, Wide) else _rounded(grad_x, factor), grad_a, grad_b


def adapter_backward(grad: Tensor | Half, x: Tensor | Half, xa: Tensor, lora: LoRA) -> tuple[Tensor, Tensor, Tensor]:
    """The adapter's part of dX in fp32, s drop(dY B A), and the gradients of A and B."""
    grad_xa, grad_a, grad_b = _adapter_gradients(grad, _dropped(x, lora), xa, lora)
    return dropout(_product(grad_xa, lora.a), lora.p, lora.seed), grad_a, grad_b


def _adapter_gradients(
    grad: Tensor | Half, dropped: Tensor | Half, xa: Tensor, lora: LoRA
) -> tuple[Tensor, Tensor, Tensor]:
    """s dY B [m, r], and the gradients of A and B."""
    grad_xa = _rounded(lora.scaling * _product(grad, lora.b), grad)
    grad_b = (lora.scaling * _product(grad.T, xa)).to(lora.b.dtype)
    return grad_xa, _product(_factor(grad_xa, grad).T, dropped).to(lora.a.dtype), grad_b


def grouped_linear(x: Tensor | Half, ends: Tensor, weight: PackedBytes, lora: LoRA) -> tuple[Tensor, Tensor]:
    """The layers of several experts: rows ends[e - 1] to ends[e] of X go through layer e; Y, and drop(X) A^T.

    Rows from the last end on belong to no expert and give zeros. X [m, in], ends int32 [experts], W [experts, out, in],
    A [experts, r, in], B [experts, out, r].
    """
    m = x.shape[0]
    like = _rounded(lora.a.new_empty(0, dtype=torch.float32), x)
    y = like.new_zeros(m, weight.shape[1])
    xa = like.new_zeros(m, lora.a.shape[1])
    dropped = _dropped(x, lora)
    for rows, matrix, a, b in zip(_groups(ends), weight.unbind(), lora.a, lora.b, strict=True):
        adapter = LoRA(a, b, lora.scaling)
        xa[rows] = lora_project(_part(dropped, rows), adapter)
        linear_into(y[rows], _part(x, rows), xa[rows], matrix, None, adapter)
    return y, xa


def grouped_linear_backward(
    grad: Tensor | Half, x: Tensor | Half, xa: Tensor, ends: Tensor, weight: PackedBytes, lora: LoRA
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of X, A and B; see `linear_backward`."""
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    dropped = _dropped(x, lora)
    grad_a = torch.empty_like(lora.a)
    grad_b = torch.empty_like(lora.b)
    for e, rows in enumerate(_groups(ends)):
        adapter = LoRA(lora.a[e], lora.b[e], lora.scaling)
        of_rows = _part(grad, rows)
        grad_xa, grad_a[e], grad_b[e] = _adapter_gradients(of_rows, _part(dropped, rows), xa[rows], adapter)
        total[rows] = _product(grad_xa, adapter.a)
    total = dropout(total, lora.p, lora.seed)  # its mask depends on the index among all rows
    for rows, matrix in zip(_groups(ends), weight.unbind(), strict=True):
        total[rows] += _product(_part(grad, rows), _decoded(matrix, grad))
    return _rounded(total, grad), grad_a, grad_b


def _product(a: Tensor | Half, b: Tensor | Half) -> Tensor:
    """a b in fp32 (fp64 of fp64), not rounded to 16 bits; b is rounded as a is."""
    other = _factor(b, a)
    if isinstance(a, Half):
        return cast(Tensor, a.to_fp32() @ other.to_fp32())
    dtype = torch.promote_types(a.dtype, torch.float32)
    return cast(Tensor, a.to(dtype) @ other.to(dtype))


def _factor(matrix: Any, like: Tensor | Half) -> Any:
    """A matrix as the factor of another one: rounded to its type, or a `Half`."""
    if not isinstance(like, Half):
        return matrix.to(like.dtype)
    return matrix if isinstance(matrix, Half) else to_half(matrix)


def _decoded(weight: PackedBytes, like: Tensor | Half) -> Any:
    """W as the factor of a matrix."""
    if not isinstance(like, Half):
        return dequantize(weight, like.dtype)
    divided, power = scaled_weight(weight)
    return Half(dequantize(divided, torch.float16), power)


def _rounded(y: Tensor, like: Tensor | Half) -> Tensor:
    """A result in the type of an input; that of a `Half` is fp32."""
    return y if isinstance(like, Half) else y.to(like.dtype)


def _dropped(x: Tensor | Half, lora: LoRA) -> Any:
    """drop(x), not rounded again."""
    if not isinstance(x, Half):
        return dropout(x, lora.p, lora.seed)
    if lora.seed is None:
        return x
    return Half(dropout(x.values.float(), lora.p, lora.seed), x.factor)


def _cast(x: Tensor | Half | Wide) -> Any:
    return x.cast.copy_(x.values) if isinstance(x, Wide) else x


def _part(x: Tensor | Half, rows: slice) -> Any:
    return Half(x.values[rows], x.factor) if isinstance(x, Half) else x[rows]


def _groups(ends: Tensor) -> list[slice]:
    numbers = ends.tolist()
    return [slice(begin, end) for begin, end in zip([0, *numbers], numbers, strict=False)]
