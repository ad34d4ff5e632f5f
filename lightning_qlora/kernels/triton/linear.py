"""The 4-bit layer with its adapter: y = x W^T + bias + s (drop(x) A^T) B^T, and its gradients.

The adapter's product comes first and the big one adds itself to it (beta = 1), which spares a pass over y. W is decoded
into one buffer per stream that is used again and again, so that cuBLAS or hipBLASLt multiplies at its full rate; only
the forward product of few rows, as in generating text, decodes inside (`matmul.py`). What few means is in `tiles.json`.
"""

import torch
from torch import Tensor

from lightning_qlora.kernels.scratch import scratch
from lightning_qlora.kernels.triton.dequantize import dequantize_into
from lightning_qlora.kernels.triton.dropout import dropout
from lightning_qlora.kernels.triton.matmul import add_matmul_, can_add_matmul
from lightning_qlora.quantize.packed import PackedBytes


def linear(
    x: Tensor, weight: PackedBytes, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `reference.linear`."""
    xa = _dropped(x, p, seed) @ lora_a.to(x.dtype).T
    y = x.new_empty(len(x), len(lora_b)) if bias is None else bias.to(x.dtype)
    y = torch.addmm(y, xa, lora_b.to(x.dtype).T, beta=0 if bias is None else 1, alpha=scaling)
    if can_add_matmul(x, weight):
        return add_matmul_(y, x, weight), xa
    return y.addmm_(x, _decoded(weight, x.dtype).T), xa


def linear_backward(
    grad: Tensor, x: Tensor, xa: Tensor, weight: PackedBytes, lora_a: Tensor, lora_b: Tensor, scaling: float,
    p: float, seed: Tensor | None, needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """See `reference.linear_backward`."""
    grad_xa = (grad @ lora_b.to(grad.dtype)).mul_(scaling)
    grad_b = (grad.T @ xa).mul_(scaling).to(lora_b.dtype)
    grad_a = (grad_xa.T @ _dropped(x, p, seed)).to(lora_a.dtype)
    if not needs_x:
        return None, grad_a, grad_b
    grad_x = grad_xa @ lora_a.to(grad.dtype)
    if seed is not None:
        dropout(grad_x, p, seed, out=grad_x)
    return grad_x.addmm_(grad, _decoded(weight, grad.dtype)), grad_a, grad_b


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """drop(x) in the buffer of the stream, or x itself without a seed."""
    if seed is None:
        return x
    x = x.contiguous()
    return dropout(x, p, seed, out=scratch(x.numel(), x.dtype, x.device, "dropped").view(x.shape))


def _decoded(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    """W in the buffer of the stream, valid until the stream decodes the next."""
    device = weight.packed.device
    buffer = scratch(weight.numel, dtype, device)
    return dequantize_into(buffer, weight).view(weight.shape)
