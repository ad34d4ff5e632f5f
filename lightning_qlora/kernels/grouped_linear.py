"""The layers of several experts as one function with its gradient: rows sorted by expert, no host synchronization.

The gradients of all experts exist, and are zero for an expert without rows: only the device knows how many it has.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lightning_qlora.kernels.backends import backend
from lightning_qlora.kernels.lora_linear import is_eager, refuse_second_derivative
from lightning_qlora.quantization.packed_weight import PackedBytes, check_bytes


def can_group(x: Tensor, weights: Sequence[PackedBytes], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor]) -> bool:
    """Whether `grouped_linear` can compute these experts: eagerly on a GPU, all of one shape and type.

    Raises:
        ValueError: If a weight has a wrong number of bytes.
    """
    if not is_eager(x, lora_a[0]):
        return False
    for weight in weights:
        check_bytes(weight)
    kinds = {(weight.shape, weight.quant_type, weight.block_size, weight.nested.numel()) for weight in weights}
    shapes = {(a.shape, a.dtype, b.shape, b.dtype) for a, b in zip(lora_a, lora_b, strict=True)}
    alike = len(kinds) == len(shapes) == 1 and lora_a[0].dtype is lora_b[0].dtype and lora_a[0].numel() > 0
    return alike and backend(x.device).can_group(x, weights, [*lora_a, *lora_b])


def grouped_linear(
    x: Tensor, ends: Tensor, weights: Sequence[PackedBytes], lora_a: Sequence[Tensor], lora_b: Sequence[Tensor],
    scaling: float, p: float = 0.0, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows ends[e - 1] to ends[e] of x through layer e: y = x W_e^T + s (drop(x) A_e^T) B_e^T.

    The layers must be ones that `can_group` accepts: the kernels read them by address.

    x is [rows, in]; rows from the last end on belong to no layer and give zeros. `ends` is int32 [experts] on x's
    device, ascending. The lists have an element for each layer; the other arguments are those of `lora_linear`, and the
    dropout mask depends on the index among all rows.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.shape[1:] != weights[0].shape[1:]:
        raise ValueError(
            f"grouped_linear: x must be [rows, {weights[0].shape[1]}] of a float type with at most 32 bits; got "
            f"{list(x.shape)}, {x.dtype}."
        )
    made = _GroupedLinear.apply(x, ends, weights, scaling, p, seed, *lora_a, *lora_b)  # type: ignore[no-untyped-call]
    return cast(Tensor, made)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ends: Tensor, weights: Sequence[PackedBytes], scaling: float, p: float,
        seed: Tensor | None, *adapters: Tensor,
    ) -> Tensor:  # fmt: skip
        x, count = x.contiguous(), len(weights)
        y, xa = backend(x.device).grouped_linear(x, ends, weights, adapters[:count], adapters[count:], scaling, p, seed)
        ctx.save_for_backward(x, xa, ends, *adapters)
        ctx.choices = weights, scaling, p, seed
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, xa, ends, *adapters = ctx.saved_tensors
        weights, scaling, p, seed = ctx.choices
        lora_a, lora_b, needs_x = adapters[: len(weights)], adapters[len(weights) :], ctx.needs_input_grad[0]
        grad_x, grad_a, grad_b = backend(x.device).grouped_linear_backward(
            grad.contiguous(), x, xa, ends, weights, lora_a, lora_b, scaling, p, seed, needs_x
        )
        return grad_x, *[None] * 5, *grad_a.unbind(), *grad_b.unbind()
