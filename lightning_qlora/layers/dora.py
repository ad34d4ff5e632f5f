"""DoRA (Liu et al. 2024, equation 5): y = g (x W^T + s (drop(x) A^T) B^T) + bias with g = m / ||W + s B A||, by rows.

g acts before the sum is rounded: it multiplies the fp32 scales of the blocks of W and the rows of B, and the op of the
layer computes the rest with its one rounding (`kernels/reference.py`). Of a sum that was rounded before, a change of m
that is smaller than half of the last bit would not arrive. The norm counts as a constant in the gradient (section 4.3):

    dm = 1 / ||W + s B A|| * sum over rows of dY (x W^T + s xa B^T) = 1 / m * sum over rows of dY (y - bias)
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

from lightning_qlora.config import BLOCK_SIZES
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.lora_linear import lora_linear, refuse_second_derivative
from lightning_qlora.quantization.packed_weight import PackedBytes

ROWS = 1024  # of the gradient that are multiplied in fp32 at a time


def dora_linear(
    x: Tensor, weight: PackedBytes, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor,
    norm: Tensor, scaling: float, p: float, seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """The layer, differentiable in x, A, B and the magnitudes m [out]; norm: ||W + s B A|| [out], see `lora_linear`."""
    factor = (magnitude.detach() / norm).float()
    scaled = scale_rows(weight, factor)
    if scaled is None:
        y = lora_linear(x.float(), weight, None, lora_a, lora_b, scaling, p, seed) * (magnitude / norm)
    else:
        y = lora_linear(x, scaled, None, lora_a, factor[:, None] * lora_b, scaling, p, seed)
        y = cast(Tensor, _WithMagnitude.apply(y, magnitude))  # type: ignore[no-untyped-call]
    return (y if bias is None else y + bias).to(x.dtype)


def scale_rows(weight: PackedBytes, factor: Tensor) -> PackedBytes | None:
    """The weight with row i times factor[i]: the same codes with other scales, in fp32.

    A block that crosses rows is split into the largest blocks that do not. None if these would have fewer than 32
    weights, which no backend decodes: rows of 720 weights, for example, consist of blocks of 16.
    """
    size = math.gcd(weight.shape[1], weight.block_size)
    if size < min(BLOCK_SIZES):
        return None
    scales = ops.scales(weight).repeat_interleave(weight.block_size // size)[: weight.numel // size]
    scales = scales.view(weight.shape[0], -1) * factor[:, None]
    absmax = scales.view(-1).view(torch.uint8)
    return PackedBytes(weight.packed, absmax, absmax[:0], weight.shape, weight.quant_type, size)


class _WithMagnitude(torch.autograd.Function):
    """y, which contains the magnitudes already, as a function of them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, magnitude: Tensor) -> Tensor:
        ctx.save_for_backward(y, magnitude)
        return y.clone()  # code after the layer may write to it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        refuse_second_derivative()
        y, magnitude = ctx.saved_tensors
        rows = (each.reshape(-1, len(magnitude)).split(ROWS) for each in (grad, y))
        total = torch.zeros_like(magnitude, dtype=torch.float32)
        for of_grad, of_y in zip(*rows, strict=True):
            total += (of_grad.float() * of_y).sum(0)
        return grad, torch.where(magnitude == 0, 0, total / magnitude).to(magnitude.dtype)
