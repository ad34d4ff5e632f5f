"""Executes compiled Triton kernels on a CPU: PTX in an interpreter of ours, AMD's machine code in that of tinygrad.

`driver.emulated("sm_80")` is a context in which every launch of a Triton kernel, with CPU tensors, is compiled for the
target and executed. The interpreter checks what a card would not tell (`memory.py`).
"""
