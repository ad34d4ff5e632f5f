"""A frozen dense layer in fp32, y = x W^T + bias, by products in fp16 with powers of two (`half.py`).

For cards without bf16, whose tensor cores take fp16. W is cast at each use, since a copy of an output embedding would
take a gigabyte; logits in pieces use one cast.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor

from lightning_qlora.kernels.backends import backend
from lightning_qlora.kernels.half import Half, multiply
from lightning_qlora.kernels.lora_linear import refuse_second_derivative

_casts: ContextVar[dict[int, tuple[Tensor, Half]] | None] = ContextVar("_casts", default=None)


@contextmanager
def one_cast() -> Iterator[None]:
    """Within it each weight is cast once, for code that changes none; backward passes there use the same cast."""
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def linear_in_half(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y, with a gradient for x alone."""
    return cast(Tensor, _Linear.apply(x, weight, bias))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        matrix = _cast(weight)
        # The thread of the backward pass has other context variables.
        ctx.matrix = None if _casts.get() is None else matrix
        y = _product(x, matrix, transposed=True)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative()
        (weight,) = ctx.saved_tensors
        matrix = _cast(weight) if ctx.matrix is None else ctx.matrix
        return _product(grad, matrix, transposed=False), None, None


def _cast(weight: Tensor) -> Half:
    casts = _casts.get()
    if casts is None:
        return backend(weight.device).rows_to_half(weight)
    if id(weight) not in casts:
        casts[id(weight)] = weight, backend(weight.device).rows_to_half(weight)
    return casts[id(weight)][1]


def _product(x: Tensor, matrix: Half, transposed: bool) -> Tensor:
    computes = backend(x.device)
    times = None
    if transposed:
        matrix = matrix.T
    else:  # a sum over the rows of W
        times = matrix.factor
    rows = computes.rows_to_half(x.reshape(-1, x.shape[-1]), times)
    sums = multiply(rows.values, matrix.values)
    return computes.take_out(sums, rows.factor, matrix.factor if transposed else None).view(*x.shape[:-1], -1)
