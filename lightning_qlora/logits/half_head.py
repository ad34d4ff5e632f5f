"""Logits on cards without bf16: y = x W^T + bias by products in fp16 with powers of two (`kernels/half.py`).

There a frozen output embedding of 16 bits is held in fp32, in which a T4 multiplies eight times slower than in fp16.
W is cast once for the loss of a batch, since a copy that is kept would take a gigabyte.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_qlora.kernels.backends import backend
from lightning_qlora.kernels.half import Half, multiply
from lightning_qlora.kernels.lora_linear import refuse_second_derivative
from lightning_qlora.tensors.device_types import lacks_bf16
from lightning_qlora.tensors.held_types import types_before

LARGE = 1 << 22  # elements of a weight, and rows, from which the cast of the weight is worth its time
MANY = 128


def half_weight(head: nn.Module, rows: int) -> Half | None:
    """The weight of a head in fp16 with powers of two, where products of this many rows should use it; else None."""
    if type(head) is not nn.Linear or "weight" not in types_before(head):  # not one with rows that train, either
        return None
    weight = head.weight
    if weight.requires_grad or weight.dtype is not torch.float32 or weight.numel() < LARGE or rows < MANY:
        return None
    return backend(weight.device).rows_to_half(weight) if lacks_bf16(weight.device) else None


def half_logits(x: Tensor, weight: Half, bias: Tensor | None) -> Tensor:
    """fp32 [rows, in] -> logits fp32 [rows, out], with a gradient for x alone."""
    return cast(Tensor, _HalfLogits.apply(x, weight, bias))  # type: ignore[no-untyped-call]


class _HalfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Half, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        computes = backend(x.device)
        rows = computes.rows_to_half(x)
        y = computes.take_out(multiply(rows.values, weight.T.values), rows.factor, weight.T.factor)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        computes = backend(grad.device)
        rows = computes.rows_to_half(grad, ctx.weight.factor)  # a sum over the rows of W, which have their own powers
        return computes.take_out(multiply(rows.values, ctx.weight.values), rows.factor, None), None, None
