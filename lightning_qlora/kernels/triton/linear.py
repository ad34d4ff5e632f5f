"""The 4-bit layer with its adapter, y = x W^T + bias + s (drop(x) A^T) B^T, and its gradients.

The product of the adapter is written first and the large product is added to it (beta = 1), which rounds once, as
`reference.py` demands, and saves a pass over y. The bias comes last, for few rows inside the product.
W is decoded into one reused buffer per stream, and cuBLAS or hipBLASLt multiplies. For few rows of x, as in generation,
`matmul.py` decodes W inside the product. `tiles.json` says for how many rows.

Launches: 4 forward (few rows: 3; many rows with a bias: 5), 5 backward, with or without dropout. The adapter in fp32
needs no 16-bit copies.
"""

import torch
from torch import Tensor

from lightning_qlora.kernels.scratch import scratch
from lightning_qlora.kernels.triton.dequantize import dequantize_into
from lightning_qlora.kernels.triton.lora_products import lora_down, lora_gradients, lora_up
from lightning_qlora.kernels.triton.matmul import add_matmul_, can_add_matmul
from lightning_qlora.quantization.packed_weight import PackedBytes


def lora_project(x: Tensor, lora_a: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """See `reference.lora_project`."""
    return lora_down(x, lora_a, p=p, seed=seed)


def linear_into(
    out: Tensor, x: Tensor, xa: Tensor, weight: PackedBytes, bias: Tensor | None, lora_b: Tensor, scaling: float
) -> None:
    """See `reference.linear_into`."""
    lora_up(xa, lora_b, out, scaling)
    if can_add_matmul(x, weight):
        add_matmul_(out, x, weight, bias)
        return
    out.addmm_(x, _decoded(weight, x.dtype).T)
    if bias is not None:
        out.add_(bias)


def linear_backward(
    grad: Tensor, x: Tensor, xa: Tensor, weight: PackedBytes, lora_a: Tensor, lora_b: Tensor, scaling: float,
    p: float, seed: Tensor | None, needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """See `reference.linear_backward`."""
    grad_xa = lora_down(grad, lora_b.T, scaling)
    grad_a, grad_b = (of.new_empty(of.shape) for of in (lora_a, lora_b))  # contiguous, as torch.compile was told
    lora_gradients(grad_xa, x, grad_a, xa, grad, grad_b, scaling, p, seed)
    if not needs_x:
        return None, grad_a, grad_b
    grad_x = lora_up(grad_xa, lora_a.T, torch.empty_like(x, memory_format=torch.contiguous_format), p=p, seed=seed)
    return grad_x.addmm_(grad, _decoded(weight, grad.dtype)), grad_a, grad_b


def _decoded(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    """W in the buffer of the stream, valid until the stream decodes the next weight."""
    buffer = scratch(weight.numel, dtype, weight.packed.device)
    return dequantize_into(buffer, weight).view(weight.shape)
