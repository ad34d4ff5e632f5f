"""DoRA (Liu et al. 2024, equation 5): y = g (x W^T + s (drop(x) A^T) B^T) + bias with g = m / ||W + s B A||, by rows.

g acts before the sum is rounded: it multiplies the fp32 scales of the blocks of W and the rows of B, and the op of the
layer computes the rest with its one rounding (`kernels/reference.py`). PEFT computes g x W^T as x W^T + (g - 1) drop(x)
W^T: equal on average, with a second product with W. The norm counts as a constant in the gradient (section 4.3):

    dm = 1 / ||W + s B A|| * sum over rows of dY (x W^T + s xa B^T) = 1 / m * sum over rows of dY (y - bias)
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_qlora.config import BLOCK_SIZES
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import grad_bias, lora_linear, refuse_second_derivative
from lightning_qlora.layers.matrix import product
from lightning_qlora.layers.prepared_call import PreparedCall
from lightning_qlora.quantization.packed_weight import PackedBytes

TINY = torch.finfo(torch.float32).tiny


class _DoRACall(PreparedCall):
    """Not kept, because each call computes the norms."""

    def product(self, layer: Any, x: Tensor, lora: LoRA) -> Tensor:
        """Differentiable in x, A, B and the magnitudes."""
        weight, _, _, magnitude, _ = self._matrix
        bias = self._bias
        norm = row_norm(layer, self._matrix).clamp_min(TINY)
        factor = (magnitude.detach() / norm).float()
        scaled = scale_rows(weight, factor)
        if scaled is None:
            y: Tensor = lora_linear(x.float(), weight, None, lora) * (magnitude / norm)
            if bias is not None:
                y = y + bias
            return y.to(x.dtype)
        y = lora_linear(x, scaled, None, LoRA(lora.a, factor[:, None] * lora.b, *lora[2:]))
        return cast(Tensor, _WithMagnitude.apply(y, magnitude, bias))  # type: ignore[no-untyped-call]


class DoRAMatrix(NamedTuple):
    """A `Matrix` with the magnitudes m of its rows."""

    weight: PackedBytes
    lora_A: Tensor
    lora_B: Tensor
    lora_magnitude_vector: Tensor
    number: int = 0

    call = _DoRACall  # type: ignore[misc]
    reads_weight = True  # type: ignore[misc]

    @staticmethod
    def complete(layer: Any) -> None:
        """Let the magnitudes be the norms of the rows, which leaves the output of a layer as it is."""
        norms = [row_norm(layer, matrix) for matrix in layer.matrices()]
        layer.write("lora_magnitude_vector", layer.join_matrices(norms))

    def merged(self, weight: Tensor, scaling: float) -> Tensor:
        """m (W + s B A) / ||W + s B A||, fp32, of this W in fp32."""
        total = weight + product(self, scaling)
        total *= (self.lora_magnitude_vector.float() / total.norm(dim=1).clamp_min(TINY)).unsqueeze(1)
        return total

    def effective(self, layer: Any, weight: Tensor) -> Tensor:
        """g (W + s B A)."""
        return dora_scale(layer, self).unsqueeze(1) * (weight + product(self, layer.scaling))


@torch.no_grad()
def row_norm(layer: Any, matrix: Any) -> Tensor:
    """||W + s B A|| of every row of a `Matrix` of a `LoRALayer`, [out], fp32, computed without that sum.

    Formula: its square is ||W||^2 + 2 s sum_r B * (W A^T + s/2 B A A^T), and the op of the layer applied to A is
    the bracket. W may be some of the rows.
    """
    weight = matrix.weight
    a = matrix.lora_A.float()
    b = matrix.lora_B.float()
    s = layer.scaling
    squares = layer._base_squares.get(matrix.number)
    if squares is None or squares.device != weight.packed.device or squares.shape[0] != weight.shape[0]:
        squares = ops.dequantize(weight, torch.float32).square_().sum(1)  # in place: it is the whole weight
        layer._base_squares[matrix.number] = squares
    bracket = lora_linear(a, weight, None, LoRA(a, b, s / 2))  # [r, out]
    norm: Tensor = (squares + 2 * s * (b * bracket.T).sum(1)).clamp_min(0).sqrt()
    return norm


def dora_scale(layer: Any, matrix: DoRAMatrix) -> Tensor:
    """g = m / ||W + s B A||, [out], fp32; the norm has no gradient."""
    scale: Tensor = matrix.lora_magnitude_vector / row_norm(layer, matrix).clamp_min(TINY)
    return scale


def scale_rows(weight: PackedBytes, factor: Tensor) -> PackedBytes | None:
    """The weight with row i times factor[i]: the same codes with other scales, in fp32.

    A block that crosses rows is split into the largest blocks that do not. None if these would have fewer than 32
    weights, which no backend decodes (rows of 720 weights, for example, consist of blocks of 16), and in
    torch.jit.trace, which can't record a view of another type.
    """
    size = math.gcd(weight.shape[1], weight.block_size)
    if size < min(BLOCK_SIZES) or torch._C._get_tracing_state() is not None:
        return None
    scales = ops.scales(weight).repeat_interleave(weight.block_size // size)[: weight.numel // size]
    scales = scales.view(weight.shape[0], -1) * factor[:, None]
    absmax = scales.view(-1).view(torch.uint8)
    return PackedBytes(weight.packed, absmax, absmax[:0], weight.shape, weight.quant_type, size)


class _WithMagnitude(torch.autograd.Function):
    """y + bias as a function of the magnitudes too, which y contains already."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, magnitude: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, magnitude)
        if bias is None:
            return y.clone()  # code after the layer may write to it
        return (y + bias).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        refuse_second_derivative()
        y, magnitude = ctx.saved_tensors
        if y.dtype is torch.float16:
            product = grad * y.float()  # in fp16 small products are zero
        else:
            product = grad * y
        total = product.reshape(-1, len(magnitude)).sum(0, dtype=torch.float32)
        grad_magnitude = torch.where(magnitude == 0, 0, total / magnitude).to(magnitude.dtype)
        of_bias = None
        if ctx.needs_input_grad[2]:
            of_bias = grad_bias(grad)
        return grad, grad_magnitude, of_bias
