"""Executes compiled Triton kernels on a CPU: the PTX that Triton makes for NVIDIA's cards, in an interpreter of ours.

`driver.emulated("sm_80")` is a context in which every launch of a Triton kernel, with CPU tensors, is compiled for the
target and executed. The interpreter checks what a card would not tell (`memory.py`).
"""
