"""Products in plain torch, of tensors and of `Half`: in the type of the first factor, of `Half` in fp32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.kernels.half import Half, multiply, scaled_weight, take_out, to_half
from lightning_qlora.quantization.packed_weight import PackedBytes


def decoded(weight: PackedBytes, like: Tensor | Half, decode: Callable[[PackedBytes, torch.dtype], Tensor]) -> Any:
    """W as the factor of a matrix; `decode` is a backend's function."""
    if not isinstance(like, Half):
        return decode(weight, like.dtype)
    divided, power = scaled_weight(weight)
    return Half(decode(divided, torch.float16), power)


def factor(matrix: Any, like: Tensor | Half) -> Any:
    """A matrix as the factor of another one: rounded to its type, or a `Half` as it is."""
    if isinstance(like, Half):
        return matrix if isinstance(matrix, Half) else to_half(matrix)
    return cast(matrix, like.dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes as long as a small product, 1 us, where there is nothing to do."""
    return x if x.dtype is dtype else x.to(dtype)


def product(a: Tensor | Half, b: Any, s: float = 1.0, out: Tensor | None = None) -> Tensor:
    """s a b, b rounded as a is: a [m, k], b [k, n], in the type of a or of `Half` in fp32; `out`: where to write it."""
    if isinstance(a, Half):
        b = factor(b, a)
        return take_out(multiply(a.values, b.values, out), a.factor, b.factor).mul_(s)
    b = cast(b, a.dtype)
    if s == 1.0:
        return torch.mm(a, b, out=out)
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    return out.addmm_(a, b, beta=0, alpha=s)


def add_product_(total: Tensor, a: Tensor | Half, b: Any) -> Tensor:
    """total += a b, summed in fp32 and rounded once; returns it."""
    if isinstance(a, Half):
        return total.add_(product(a, b))
    return total.addmm_(a, b)
