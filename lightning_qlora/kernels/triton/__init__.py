"""The ops on a GPU, in Triton: imported by `backends` when the first tensor on such a device comes, never before."""

from lightning_qlora.kernels.triton.adamw import adamw8bit_step, adamw_step
from lightning_qlora.kernels.triton.dequantize import dequantize
from lightning_qlora.kernels.triton.linear import linear, linear_backward
from lightning_qlora.kernels.triton.quantize import quantize

__all__ = ["adamw8bit_step", "adamw_step", "dequantize", "linear", "linear_backward", "quantize"]
