"""The op table: schema and shape function (fake) of every op; `backends` chooses who computes it.

Quantizing, decoding, the scales, the layer and its gradients are `torch.library` ops, so torch.compile sees each as one
opaque node and `torch.library.opcheck` can test them. Call `quantize` and `dequantize` here, and
`lora_linear.lora_linear`, which adds the gradient.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import Tensor

from lightning_qlora.checks import check_bool, check_choice, check_finite
from lightning_qlora.config import BLOCK_SIZES, QuantType
from lightning_qlora.kernels.backends import backend, plan_of
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.quantization.blockwise import FLOATS, NESTED_BLOCK_SIZE
from lightning_qlora.quantization.packed_weight import PackedBytes, PackedWeight, check_bytes, scales_of

NO_VALUES = (
    "If its memory has no values yet (to_empty, empty_init=True), load the base before conversion: in __init__ or "
    "configure_model, or before fabric.setup."
)
SPREADS = f"It would spread to a whole block, or to all of it. {NO_VALUES}"  # of NaN or Inf in a weight


def quantize(
    weight: Tensor, quant_type: QuantType = "nf4", block_size: int = 64, double_quant: bool = True
) -> PackedWeight:
    """Quantize a float weight to 4 bits, with bitsandbytes' bytes.

    Each block of `block_size` weights is divided by its largest magnitude and every weight takes the code of the
    nearest of 16 levels; with `double_quant` the block scales are quantized to 8 bits as well (QLoRA paper, section 3).

    Args:
        weight: Weight of any shape with at least one element; fp32, bf16 or fp16, on any device.
        quant_type: 4-bit data type.
        block_size: Number of weights that share one scale: a power of two from 32 to 4096.
        double_quant: Quantize the scales again.

    Returns:
        The packed weight; `dequantize()` decodes it.

    Raises:
        TypeError: If the weight is not a tensor of one of the three float types.
        ValueError: If an argument is not among the allowed values, or the weight holds NaN or Inf.

    Example:
        ```python
        import torch
        from lightning_qlora import quantize

        weight = torch.randn(64, 64)
        packed = quantize(weight, quant_type="nf4", block_size=64)
        error = packed.dequantize() - weight
        ```
    """
    check_choice("quant_type", quant_type, get_args(QuantType))
    check_choice("block_size", block_size, BLOCK_SIZES)
    check_bool("double_quant", double_quant)
    stored = quantize_bytes(weight, quant_type, block_size, double_quant)
    return replace(PackedWeight.from_bytes(stored, weight.dtype), shape=tuple(weight.shape))


def quantize_bytes(weight: Tensor, quant_type: QuantType, block_size: int, double_quant: bool) -> PackedBytes:
    """The same as a layer stores it, of a weight [out, in]; one of another shape becomes a column."""
    if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"weight: a tensor of type float32, bfloat16 or float16 can be quantized, not {kind}.")
    if weight.is_meta:
        raise ValueError("weight: is on the meta device, so there is no data to quantize; load the weights first.")
    if not weight.numel():
        raise ValueError(f"weight: has shape {list(weight.shape)} and no element to quantize.")
    check_finite("weight:", weight, SPREADS)
    stored = quantize_unchecked(weight, quant_type, block_size, double_quant)
    if double_quant and not stored.nested[-4:].view(torch.float32).isfinite():
        raise ValueError(
            "weight: too large for double quantization: the mean of its scales overflows fp32. "
            f"{NO_VALUES} Else pass double_quant=False."
        )
    return stored


def quantize_unchecked(weight: Tensor, quant_type: QuantType, block_size: int, double_quant: bool) -> PackedBytes:
    """The same without checks, also for a weight that has no values."""
    matrix = weight.detach()
    if matrix.ndim != 2:
        matrix = matrix.reshape(-1, 1)  # blocks cross rows
    packed, absmax, nested = torch.ops.lightning_qlora.quantize(matrix, quant_type, block_size, double_quant)
    return PackedBytes(packed, absmax, nested, tuple(matrix.shape), quant_type, block_size)


def dequantize(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    return cast(Tensor, torch.ops.lightning_qlora.dequantize(*weight, dtype))


def scales(weight: PackedBytes, numbers: Tensor | None = None) -> Tensor:
    """Scale of every block, fp32 [blocks]; `numbers`: see `blockwise.dequantize_absmax`."""
    return cast(Tensor, torch.ops.lightning_qlora.scales(weight.absmax, weight.nested, numbers))


TAGS = (torch.Tag.cudagraph_unsafe,)  # not inside a CUDA graph (torch.compile's "reduce-overhead")


@torch.library.custom_op("lightning_qlora::quantize", mutates_args=(), tags=TAGS)
def _quantize(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor, Tensor]:
    packed = backend(weight.device).quantize(weight, cast(QuantType, quant_type), block_size, double_quant)
    return packed.packed, packed.absmax, packed.nested


@_quantize.register_fake
def _(weight: Tensor, _: str, block_size: int, double_quant: bool) -> tuple[Tensor, Tensor, Tensor]:
    blocks = -(-weight.numel() // block_size)
    packed = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    if not double_quant:
        return packed, packed.new_empty(4 * blocks), packed.new_empty(0)
    return packed, packed.new_empty(blocks), packed.new_empty(4 * (-(-blocks // NESTED_BLOCK_SIZE) + 1))


def _refuse_onnx() -> None:
    """Raise RuntimeError while torch.onnx exports. Called within ops, which torch.export runs and does not trace."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "4-bit layers can't be exported to ONNX. Merge first, in a copy if the training goes on: "
            "lightning_qlora.merge(copy.deepcopy(module)) has dense layers with the adapters added."
        )


# The fields of `PackedBytes` and of `LoRA`, one by one.
WEIGHT = "Tensor packed, Tensor absmax, Tensor nested, SymInt[] shape, str quant_type, int block_size"
LORA = "Tensor lora_a, Tensor lora_b, float scaling, float p, Tensor? seed, bool in_fp16"
WEIGHT_FIELDS = len(PackedBytes._fields)


def _weight_of(fields: Sequence[Any]) -> PackedBytes:
    packed, absmax, nested, shape, *form = fields[:WEIGHT_FIELDS]
    return PackedBytes(packed, absmax, nested, tuple(shape), *form)


@torch.library.custom_op(
    "lightning_qlora::dequantize", mutates_args=(), schema=f"({WEIGHT}, ScalarType dtype) -> Tensor"
)
def _dequantize(*arguments: Any) -> Tensor:
    _refuse_onnx()
    weight = _weight_of(arguments)
    check_bytes(weight)
    return backend(weight.packed.device).dequantize(weight, arguments[-1])


@_dequantize.register_fake
def _(*arguments: Any) -> Tensor:
    _refuse_onnx()
    weight = _weight_of(arguments)
    return weight.packed.new_empty(weight.shape, dtype=arguments[-1])


@torch.library.custom_op("lightning_qlora::scales", mutates_args=())
def _scales(absmax: Tensor, nested: Tensor, numbers: Tensor | None) -> Tensor:
    values = scales_of(absmax, nested, numbers)
    return values if nested.numel() else values.clone()


@_scales.register_fake
def _(absmax: Tensor, nested: Tensor, _: Tensor | None) -> Tensor:
    blocks = absmax.numel()
    if not nested.numel():  # the bytes of fp32 scales
        blocks //= 4
    return absmax.new_empty(blocks, dtype=torch.float32)


def _lora_linear(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """y, and drop(x) A^T for the backward pass; see `lora_linear.lora_linear`."""
    _refuse_onnx()
    weight = _weight_of(rest)
    bias, *fields = rest[WEIGHT_FIELDS:]
    lora = LoRA(*fields)
    plan = plan_of(x, weight, bias, lora)
    y = x.new_empty(plan.shape)
    with torch.autocast(plan.kind, enabled=False):
        rows = plan.rows(x, lora.seed)
        xa = plan.lora_project(rows, lora)
        plan.linear_into(plan.matrix(y), rows, xa, weight, bias, lora)
    return y, xa


def _shapes(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _refuse_onnx()
    lora = LoRA(*rest[WEIGHT_FIELDS + 1 :])
    out_features = _weight_of(rest).shape[0]
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(math.prod(x.shape[:-1]), lora.a.shape[0])


def _lora_linear_backward(grad: Tensor, x: Tensor, xa: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (empty if it is not needed), A and B."""
    *fields, needs_x = rest[WEIGHT_FIELDS:]
    weight = _weight_of(rest)
    lora = LoRA(*fields)
    grad_x, grad_a, grad_b = plan_of(x, weight, None, lora).gradients(grad, x, xa, weight, lora, needs_x)
    if grad_x is None:
        grad_x = x.new_empty(0)
    return grad_x, grad_a, grad_b


def _shapes_of_backward(grad: Tensor, x: Tensor, xa: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, needs_x = rest[WEIGHT_FIELDS:]
    lora = LoRA(*fields)
    return x.new_empty(x.shape if needs_x else 0), lora.a.new_empty(lora.a.shape), lora.b.new_empty(lora.b.shape)


def _with_and_without_dropout(name: str, run: Any, fake: Any, schema: str) -> list[Any]:
    """The op `name` and another one with "_dropout", whose replays would repeat one mask: the host reads its seed."""
    ops = []
    for suffix, tags in (("", ()), ("_dropout", TAGS)):
        name_of_op = f"lightning_qlora::{name}{suffix}"
        op = torch.library.custom_op(name_of_op, run, mutates_args=(), tags=tags, schema=schema)
        op.register_fake(fake)
        ops.append(op)
    return ops


LAYER_OPS = _with_and_without_dropout(
    "lora_linear", _lora_linear, _shapes, f"(Tensor x, {WEIGHT}, Tensor? bias, {LORA}) -> (Tensor, Tensor)"
)
_with_and_without_dropout(
    "lora_linear_backward",
    _lora_linear_backward,
    _shapes_of_backward,
    f"(Tensor grad, Tensor x, Tensor xa, {WEIGHT}, {LORA}, bool needs_x) -> (Tensor, Tensor, Tensor)",
)
