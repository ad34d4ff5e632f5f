"""The op table; `backends` says who computes each on which device.

    quantize          float weight -> 4-bit bytes
    dequantize        4-bit bytes -> float weight
    lora_linear       y = x W^T + bias + s (drop(x) A^T) B^T, W in 4 bits; saves x and drop(x) A^T for the backward pass
    lora_linear_backward

    adamw_step, adamw8bit_step      one step of the optimizer over many tensors

The first four are `torch.library` ops: torch.compile sees each as one opaque node, and `torch.library.opcheck` can
test them.
"""

from torch import Tensor

from lightning_qlora.kernels.adamw import AdamWStep
from lightning_qlora.kernels.backends import backend
from lightning_qlora.kernels.codec import FLOATS, dequantize, quantize
from lightning_qlora.kernels.lora_linear import lora_linear

__all__ = ["FLOATS", "adamw8bit_step", "adamw_step", "dequantize", "lora_linear", "quantize"]


def adamw_step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], scalars: AdamWStep
) -> None:
    """One AdamW step with fp32 state over tensors of one device, in place; see `adamw.adamw_step`."""
    backend(params[0].device).adamw_step(params, grads, exp_avgs, exp_avg_sqs, scalars)


def adamw8bit_step(
    params: list[Tensor], grads: list[Tensor], exp_avg_codes: list[Tensor], exp_avg_absmaxes: list[Tensor],
    exp_avg_sq_codes: list[Tensor], exp_avg_sq_absmaxes: list[Tensor], scalars: AdamWStep,
) -> None:  # fmt: skip
    """One AdamW step with 8-bit state over tensors of one device, in place; see `adamw.adamw8bit_step`."""
    backend(params[0].device).adamw8bit_step(
        params, grads, exp_avg_codes, exp_avg_absmaxes, exp_avg_sq_codes, exp_avg_sq_absmaxes, scalars
    )
