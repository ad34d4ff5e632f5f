"""A LoRA layer for PEFT that rounds its output once, as the layers of this package do.

In 16 bits PEFT computes round(round(x W^T + bias) + s x A^T B^T), and loses a small change of B where x W^T is large.
`OneRoundingLinear` computes round(x W^T + s x A^T B^T) and adds the bias last, and rounds once in the backward pass
too, so that a comparison of QLoRA with 16-bit LoRA does not compare two orders of addition.
"""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _OneRounding(torch.autograd.Function):
    """x W^T + s x A^T B^T for a frozen weight W.

    Shapes: x [rows, in_features], weight [out_features, in_features], A [r, in_features], B [out_features, r].
    The adapter is computed in the dtype of x; its gradients have its own dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
        xa = x @ lora_a.to(x.dtype).T
        ctx.save_for_backward(x, xa, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return torch.addmm(scaling * (xa @ lora_b.to(x.dtype).T), x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, weight, lora_a, lora_b = ctx.saved_tensors
        grad_xa = ctx.scaling * (grad @ lora_b.to(grad.dtype))
        grad_a = (grad_xa.T @ x).to(lora_a.dtype)
        grad_b = (ctx.scaling * (grad.T @ xa)).to(lora_b.dtype)
        grad_x = torch.addmm(grad_xa @ lora_a.to(grad.dtype), grad, weight)
        return grad_x, None, grad_a, grad_b, None


class OneRoundingLinear(Linear):
    """PEFT's LoRA layer for nn.Linear with one adapter, without dropout and adapter variants, that rounds once."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (name,) = self.active_adapters
        base, a, b = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        y = _OneRounding.apply(x.flatten(0, -2), base.weight, a, b, self.scaling[name])
        y = y.view(*x.shape[:-1], -1)
        return y if base.bias is None else y + base.bias


def one_rounding(config: LoraConfig) -> LoraConfig:
    """Let PEFT use `OneRoundingLinear` for nn.Linear."""
    config._register_custom_module({nn.Linear: OneRoundingLinear})
    return config
