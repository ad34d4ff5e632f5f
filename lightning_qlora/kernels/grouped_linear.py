"""The layers of several experts as one function with its gradient: rows sorted by expert, no host synchronization.

The gradients of all experts exist, and are zero for an expert without rows: only the device knows how many it has.
"""

from typing import Any, cast

import torch
from torch import Tensor

from lightning_qlora.kernels.backends import backend
from lightning_qlora.kernels.half import Half, to_half
from lightning_qlora.kernels.lora import LoRA, check_devices
from lightning_qlora.kernels.lora_linear import is_plain_call, refuse_second_derivative
from lightning_qlora.quantization.blockwise import FLOATS
from lightning_qlora.quantization.packed_weight import PackedBytes, check_bytes


def can_group(x: Tensor, weight: PackedBytes, lora: LoRA) -> bool:
    """Whether `grouped_linear` can compute these experts: eagerly on a GPU.

    Raises:
        ValueError: If the weight has a wrong number of bytes, or is on another device than x.
    """
    if not is_plain_call(x, lora.a):
        return False
    check_bytes(weight)
    check_devices(x, weight, lora)
    alike = lora.a.dtype is lora.b.dtype and lora.a.numel() > 0
    return alike and backend(x.device).can_group(x, weight, lora)


def grouped_linear(x: Tensor, ends: Tensor, weight: PackedBytes, lora: LoRA) -> Tensor:
    """Rows ends[e - 1] to ends[e] of x through layer e: y = x W_e^T + s (drop(x) A_e^T) B_e^T.

    The layers must be ones that `can_group` accepts: the kernels read them by address.

    x is [rows, in]; rows from the last end on belong to no layer and give zeros. `ends` is int32 [experts] on x's
    device, ascending. The weight is [experts, out, in], A [experts, r, in], B [experts, out, r]. The dropout mask
    depends on the index among all rows.
    """
    if x.dtype not in FLOATS or x.shape[1:] != weight.shape[2:]:
        raise ValueError(
            f"grouped_linear: x must be [rows, {weight.shape[2]}] of a float type with at most 32 bits; got "
            f"{list(x.shape)}, {x.dtype}."
        )
    # One argument for all that has no gradient: `apply` and autograd do something for each.
    y = _GroupedLinear.apply(x, lora.a, lora.b, (ends, weight, lora[2:]))  # type: ignore[no-untyped-call]
    return cast(Tensor, y)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_a: Tensor, lora_b: Tensor, rest: tuple[Tensor, PackedBytes, Any]) -> Tensor:
        ends, weight, choices = rest
        x = x.contiguous()
        lora = LoRA(lora_a, lora_b, *choices)
        y, xa = backend(x.device).grouped_linear(_factor(x, lora), ends, weight, lora)
        ctx.save_for_backward(x, xa, ends, lora_a, lora_b)
        ctx.rest = weight, choices
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, xa, ends, lora_a, lora_b = ctx.saved_tensors
        weight, choices = ctx.rest
        lora = LoRA(lora_a, lora_b, *choices)
        factors = _factor(grad.contiguous(), lora), _factor(x, lora)
        return *backend(x.device).grouped_linear_backward(*factors, xa, ends, weight, lora), None


def _factor(rows: Tensor, lora: LoRA) -> Tensor | Half:
    return to_half(rows) if lora.in_fp16 else rows
