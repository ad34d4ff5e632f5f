"""The ops on a GPU, in Triton; `backends` imports this folder when it meets the first tensor on a GPU."""

from lightning_qlora.kernels.triton.adamw import adamw8bit_step, adamw_step
from lightning_qlora.kernels.triton.dequantize import dequantize
from lightning_qlora.kernels.triton.launch import check_launch
from lightning_qlora.kernels.triton.linear import linear_backward, linear_into, lora_project
from lightning_qlora.kernels.triton.quantize import quantize

__all__ = [
    "adamw8bit_step", "adamw_step", "check_launch", "dequantize", "linear_backward", "linear_into", "lora_project",
    "quantize",
]  # fmt: skip
