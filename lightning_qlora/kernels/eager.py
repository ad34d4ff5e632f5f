"""The backend of CPUs, and of other devices without Triton: the C kernels of `cpu/` where they exist, else plain torch.

The results are those of `reference.py`. The weight is decoded into a reused buffer, or inside the product for few rows
of input (C kernels only). The adapter's product is written first and the large one added to it (beta = 1), which sums
in fp32 and rounds once, as `reference.py` demands. The bias comes last.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels import reference
from lightning_qlora.kernels.cpu.library import OFF, Library, compiled_library, is_off
from lightning_qlora.kernels.half import Half
from lightning_qlora.kernels.half import to_half as to_half
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.products import add_product_, cast, decoded, factor, product
from lightning_qlora.kernels.reference import adamw8bit_step as adamw8bit_step
from lightning_qlora.kernels.reference import adamw_step as adamw_step
from lightning_qlora.kernels.reference import dropout_kept, dropout_threshold
from lightning_qlora.kernels.reference import grouped_linear as grouped_linear
from lightning_qlora.kernels.reference import grouped_linear_backward as grouped_linear_backward
from lightning_qlora.kernels.scratch import scratch
from lightning_qlora.quantization.blockwise import CHUNK
from lightning_qlora.quantization.packed_weight import PackedBytes


def path() -> str:
    """How the CPU computes, as a text for users."""
    library = compiled_library()
    if library is not None:
        return f"C kernels, {library.form}"
    if is_off():
        return f"plain torch ({OFF} is set)"
    return "plain torch (the C kernels could not be compiled)"


def _library(x: Tensor) -> Library | None:
    if x.device.type != "cpu":
        return None
    library = compiled_library()
    if library is None or x.dtype not in library.types:
        return None
    return library


def quantize(weight: Tensor, quant_type: QuantType, block_size: int, double_quant: bool) -> PackedBytes:
    """See `reference.quantize`."""
    library = _library(weight)
    if library is None:
        return reference.quantize(weight, quant_type, block_size, double_quant)
    return library.quantize(weight, quant_type, block_size, double_quant)


def dequantize(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    return dequantize_into(weight.packed.new_empty(weight.numel, dtype=dtype), weight).view(weight.shape)


def dequantize_into(out: Tensor, weight: PackedBytes) -> Tensor:
    library = _library(out)
    if library is None:
        return weight.dequantize_into(out)
    return library.dequantize_into(out, weight)


def lora_project(x: Tensor | Half, lora: LoRA) -> Tensor:
    return product(_dropped(x, lora), lora.a.T)


def linear_into(
    out: Tensor, x: Tensor | Half, xa: Tensor, weight: PackedBytes, bias: Tensor | None, lora: LoRA
) -> None:
    if isinstance(x, Tensor) and linear_in_one_call(out, x, weight, bias, lora, xa):
        return
    product(factor(xa, x), lora.b.T, lora.scaling, out)
    add_product_(out, x, decoded(weight, x, _decoded).T)
    if bias is not None:
        out.add_(bias)


def linear_in_one_call(
    out: Tensor, x: Tensor, weight: PackedBytes, bias: Tensor | None, lora: LoRA, xa: Tensor | None = None
) -> bool:
    """`linear_into` in one call of C, which decodes W inside the product; False if there is none for so many rows.

    Without xa it also computes x A^T, without dropout.
    """
    library = _library(x)
    if library is None or not library.is_fast_for(x.shape[0], x.dtype):
        return False
    library.lora_linear(out, x, weight, bias, lora, xa)
    return True


def linear_backward(
    grad: Tensor | Half, x: Tensor | Half, xa: Tensor, weight: PackedBytes, lora: LoRA, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    grad_xa = factor(product(grad, lora.b, lora.scaling), grad)
    grad_b = cast(product(grad.T, xa, lora.scaling), lora.b.dtype)
    grad_a = cast(product(grad_xa.T, _dropped(x, lora)), lora.a.dtype)
    if not needs_x:
        return None, grad_a, grad_b
    grad_x = product(grad_xa, lora.a)
    if lora.seed is not None:
        _dropout(grad_x, grad_x, lora.p, lora.seed)
    return add_product_(grad_x, grad, decoded(weight, grad, _decoded)), grad_a, grad_b


def _decoded(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    """W in the reused buffer, valid until the next weight is decoded."""
    return dequantize_into(scratch(weight.numel, dtype, weight.packed.device), weight).view(weight.shape)


def _dropped(x: Tensor | Half, lora: LoRA) -> Any:
    """drop(x), of a tensor in a reused buffer, valid until the next call; x itself without a seed."""
    if lora.seed is None:
        return x
    if isinstance(x, Half):  # with a power of two of its own: dividing by 1 - p can pass the end of fp16
        values = x.to_fp32().contiguous()
        return to_half(_dropout(values, values, lora.p, lora.seed))
    x = x.contiguous()
    return _dropout(scratch(x.numel(), x.dtype, x.device, "dropped").view(x.shape), x, lora.p, lora.seed)


def _dropout(out: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
    library = _library(x)
    if library is None:
        return dropout_in_chunks(out, x, p, seed)
    return library.dropout_into(out, x, p, seed)


def can_group(*_: object) -> bool:
    """A CPU computes expert by expert: it knows without waiting how many rows each of them has."""
    return False


def dropout_in_chunks(out: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
    """See `reference.dropout`; `out` may be `x`, both contiguous."""
    source = x.view(-1)
    flat = out.view(-1)
    _, factor = dropout_threshold(p)
    for start in range(0, flat.numel(), CHUNK):
        stop = min(start + CHUNK, flat.numel())
        keep = dropout_kept(start, stop, p, seed, x.device)
        flat[start:stop] = torch.where(keep, source[start:stop] * factor, 0)
    return out
