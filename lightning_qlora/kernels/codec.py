"""The ops that pack a float weight into 4 bits and decode it again; `backends` says who computes them."""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lightning_qlora.config import BLOCK_SIZES, QuantType, check_bool, check_choice
from lightning_qlora.kernels.backends import backend
from lightning_qlora.quantize.blockwise import NESTED_BLOCK_SIZE
from lightning_qlora.quantize.packed import PackedBytes, PackedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    weight: Tensor, quant_type: QuantType = "nf4", block_size: int = 64, double_quant: bool = True
) -> PackedWeight:
    """Quantize a float weight to 4 bits, with bitsandbytes' bytes.

    Each block of `block_size` weights is divided by its largest magnitude and every weight takes the code of the
    nearest of 16 levels; with `double_quant` the block scales are quantized to 8 bits as well (QLoRA paper, section 3).

    Args:
        weight: Weight of any shape with at least one element; fp32, bf16 or fp16, on any device.
        quant_type: "nf4", "fp4" or "int4".
        block_size: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        double_quant: Quantize the scales again.

    Returns:
        The packed weight; `dequantize()` decodes it.

    Raises:
        TypeError: If the weight is not a tensor of one of the three float types.
        ValueError: If an argument is not among the allowed values, or the weight holds NaN or Inf.
    """
    check_choice("quant_type", quant_type, ("nf4", "fp4", "int4"))
    check_choice("block_size", block_size, BLOCK_SIZES)
    check_bool("double_quant", double_quant)
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        raise TypeError(
            f"weight: a tensor of type float32, bfloat16 or float16 can be quantized, not "
            f"{weight.dtype if isinstance(weight, Tensor) else type(weight).__name__}."
        )
    if weight.is_meta:
        raise ValueError("weight: is on the meta device, so there is no data to quantize; load the weights first.")
    if not weight.numel():
        raise ValueError(f"weight: has shape {list(weight.shape)} and no element to quantize.")
    low, high = torch.aminmax(weight.detach())
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError("weight: holds NaN or Inf, which would spread to a whole block, or to all of it.")
    rows = weight.detach().reshape(-1, weight.shape[-1] if weight.ndim else 1)
    packed, absmax, nested = torch.ops.lightning_qlora.quantize(rows, quant_type, block_size, double_quant)
    if double_quant and not torch.isfinite(nested.view(torch.float32)[-1]):
        raise ValueError("weight: too large for double quantization, the mean of its scales overflows fp32.")
    as_rows = PackedBytes(packed, absmax, nested, (rows.shape[0], rows.shape[1]), quant_type, block_size)
    return replace(PackedWeight.from_bytes(as_rows, weight.dtype), shape=tuple(weight.shape))


def dequantize(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    """The float weight [out, in] behind 4-bit bytes."""
    result: Tensor = torch.ops.lightning_qlora.dequantize(
        weight.packed, weight.absmax, weight.nested, list(weight.shape), weight.quant_type, weight.block_size, dtype
    )
    return result


@torch.library.custom_op("lightning_qlora::quantize", mutates_args=())
def _quantize(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor, Tensor]:
    made = backend(weight.device).quantize(weight, cast(QuantType, quant_type), block_size, double_quant)
    return made.packed, made.absmax, made.nested


@_quantize.register_fake
def _(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor, Tensor]:
    blocks = -(-weight.numel() // block_size)
    nested = 4 * (-(-blocks // NESTED_BLOCK_SIZE) + 1) if double_quant else 0
    sizes = (weight.numel() + 1) // 2, blocks if double_quant else 4 * blocks, nested
    packed, absmax, nested_bytes = (weight.new_empty(size, dtype=torch.uint8) for size in sizes)
    return packed, absmax, nested_bytes


@torch.library.custom_op("lightning_qlora::dequantize", mutates_args=())
def _dequantize(
    packed: Tensor, absmax: Tensor, nested: Tensor, shape: list[int], quant_type: str, block_size: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    weight = PackedBytes(packed, absmax, nested, (shape[0], shape[1]), cast(QuantType, quant_type), block_size)
    check_bytes(weight)
    return backend(packed.device).dequantize(weight, dtype)


@_dequantize.register_fake
def _(
    packed: Tensor, absmax: Tensor, nested: Tensor, shape: list[int], quant_type: str, block_size: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return packed.new_empty(shape, dtype=dtype)


def check_bytes(weight: PackedBytes) -> None:
    """The loops and kernels are given addresses: of a weight with too few bytes they would read what lies behind it."""
    blocks = -(-weight.numel // weight.block_size)
    needed = (weight.numel + 1) // 2, blocks if weight.nested.numel() else 4 * blocks
    if (weight.packed.numel(), weight.absmax.numel()) != needed:
        raise ValueError(
            f"A 4-bit weight {list(weight.shape)} in blocks of {weight.block_size} has {needed[0]} bytes of codes and "
            f"{needed[1]} of scales; got {weight.packed.numel()} and {weight.absmax.numel()}."
        )
