"""The ops on a GPU, in Triton; `backends` imports this folder when it meets the first tensor on a GPU."""

# ruff: noqa: F401
from lightning_qlora.kernels.triton.grouped import can_group, grouped_linear, grouped_linear_backward
from lightning_qlora.kernels.triton.half import rows_to_half
from lightning_qlora.kernels.triton.half import take_out_ as take_out
from lightning_qlora.kernels.triton.launch import check_launch
from lightning_qlora.kernels.triton.linear import plan
from lightning_qlora.kernels.triton.quantize import dequantize, quantize
