"""The ops on a GPU, in Triton: imported by `ops.backend` when the first tensor on such a device comes, never before."""

from lightning_qlora.kernels.cpu import linear, linear_backward, quantize
from lightning_qlora.kernels.triton.dequantize import dequantize

__all__ = ["dequantize", "linear", "linear_backward", "quantize"]
