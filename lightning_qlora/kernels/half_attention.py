"""Attention of fp32 tensors in fp16, whose numbers begin at 6e-8 and end at 65504, with powers of two.

    q = 2^a q16     k = 2^-a k16     v = 2^c v16            attention(q, k, v) = 2^c attention(q16, k16, v16)

A card without bf16 has fused attention in fp16, and in fp32 at an eighth of its speed. The powers of q and k cancel, so
the scale of the scores stays a number of the host, which does not wait for the device. The fused attention rounds the
gradients of scores and its results to fp16. The powers come from the largest norms of rows, so none of them overflows:

    |dS| <= 2 |dY| |v|      |dq| <= s |dS| |k|      |dk| <= n s |dS| |q|      |dv| <= n |dY|      n queries, scale s

Scores above 2^30, and those that round to nothing, don't keep their size: one key has all of the weight, or all alike.
"""

from collections.abc import Callable
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.kernels.backends import backend
from lightning_qlora.kernels.lora_linear import refuse_second_derivative

END = 15  # values stay below 2^END; fp16 ends at 2^16
OF_V = 4  # rows of v16 have norms below 2^OF_V
OF_DS = 13  # dP = dY v^T, from which dS is computed, is below 2^OF_DS
SMALL = -12  # scores below 2^SMALL change probabilities by less than fp16 rounds
LARGEST = 120  # exponent of a factor in fp32


def attention_in_half(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, scale: float, sums: int
) -> Tensor:
    """`attend(q, k, v)`, attention with the scores `scale` q k^T, in fp32, by what it computes in fp16.

    `sums`: n above, of all heads that share a key.
    """
    *halves, factor, of_grad = _ToHalf.apply(q, k, v, scale, sums)  # type: ignore[no-untyped-call]
    y: Tensor = _FromHalf.apply(attend(*halves), factor, of_grad)  # type: ignore[no-untyped-call]
    return y


class _ToHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, sums: int) -> tuple[Tensor, ...]:
        """q16, k16, v16, 2^c, and the exponent of the norms that rows of dY should have."""
        ctx.set_materialize_grads(False)
        of_q, of_k, of_v = (backend(x.device).norm_exponent(x) for x in (q, k, v))
        of_sums = sums.bit_length()
        of_scale = ceil(log2(scale))
        of_scores = (of_q + of_k).clamp_(min=SMALL - of_scale)
        of_k16 = ((of_scores + of_sums) // 2).clamp_(max=END)  # with it dq and dk have the same limit
        of_q16 = (of_scores - of_k16).clamp_(max=END)
        exponents = of_q16 - of_q, of_k16 - of_k, OF_V - of_v
        halves = [_times(x, _power(exponent)) for x, exponent in zip((q, k, v), exponents, strict=True)]
        of_grad = (END - 2 - OF_V - of_scale - of_k16).clamp_(max=min(END - of_sums, OF_DS - OF_V))
        ctx.mark_non_differentiable(of_grad)
        # ds/dq = k, which is k16 times its power, also where the powers of q and k don't cancel.
        ctx.save_for_backward(_power(-exponents[1]), _power(-exponents[0]), _power(exponents[2]))
        return *halves, _power(-exponents[2]), of_grad

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        *of_halves, factor, _ = grads
        pairs = zip(of_halves, ctx.saved_tensors, strict=True)
        return *(None if grad is None else grad * (power * factor) for grad, power in pairs), None, None


class _FromHalf(torch.autograd.Function):
    """y16 times its factor. What dY was multiplied by goes to `_ToHalf` as the gradient of the factor."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, factor: Tensor, of_grad: Tensor) -> Tensor:
        ctx.save_for_backward(factor, of_grad)
        return y * factor  # in fp32

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        refuse_second_derivative()
        factor, of_grad = ctx.saved_tensors
        exponent = of_grad - backend(grad.device).norm_exponent(grad)
        return _times(grad, _power(exponent)), factor * _power(-exponent), None


def _power(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.clamp(-LARGEST, LARGEST).double()).float()


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """In fp16, in one pass over x."""
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=torch.float16))
