"""A frozen dense layer in fp32, y = x W^T + bias, by products in fp16 with powers of two (`half.py`).

For cards without bf16, whose tensor cores take fp16. W is cast at each use, since a copy of an output embedding would
take a gigabyte.
"""

from typing import Any, cast

import torch
from torch import Tensor

from lightning_qlora.kernels.backends import backend
from lightning_qlora.kernels.half import multiply
from lightning_qlora.kernels.lora_linear import refuse_second_derivative


def linear_in_half(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y, with a gradient for x alone."""
    return cast(Tensor, _Linear.apply(x, weight, bias))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y = _product(x, weight, transposed=True)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        (weight,) = ctx.saved_tensors
        return _product(grad, weight, transposed=False), None, None


def _product(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    computes = backend(x.device)
    matrix = computes.rows_to_half(weight)
    times = None
    if transposed:
        matrix = matrix.T
    else:  # a sum over the rows of W
        times = matrix.factor
    rows = computes.rows_to_half(x.reshape(-1, x.shape[-1]), times)
    sums = multiply(rows.values, matrix.values)
    return computes.take_out(sums, rows.factor, matrix.factor if transposed else None).view(*x.shape[:-1], -1)
