"""DoRA: the magnitude of every output row learnt apart from its direction (Liu et al. 2024, equation 5).

    y = m / ||W + s B A|| * (x W^T + s (drop(x) A^T) B^T) + bias

The norm counts as a constant in the gradient (section 4.3 of the paper). Dropout falls on the adapter's input alone.
With g = m / norm PEFT writes g x W^T as x W^T + (g - 1) drop(x) W^T: the same on average, for a second product with W.
"""

import torch
from torch import Tensor

from lightning_qlora.kernels import ops
from lightning_qlora.quantize.packed import PackedBytes


@torch.no_grad()
def row_squares(weight: PackedBytes) -> Tensor:
    """||W||^2 of every row, fp32 [out]: constant, since W is."""
    return ops.dequantize(weight, torch.float32).square_().sum(1)  # in place: it is the whole weight


@torch.no_grad()
def row_norm(weight: PackedBytes, squares: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """||W + s B A|| of every row, fp32 [out], without ever holding that matrix.

    The square is ||W||^2 + 2 s sum_r B * (W A^T + s/2 B A A^T), whose bracket is the layer's own op applied to A.
    """
    a, b = lora_a.float(), lora_b.float()
    bracket = ops.lora_linear(a, weight, None, a, b, scaling / 2)  # [r, out]
    return (squares + 2 * scaling * (b * bracket.T).sum(1)).clamp_min(0).sqrt()
