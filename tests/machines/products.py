"""Whether products of 16-bit matrices are slow is an input of the tests, not a property of the processor they run on.

A test has fast and exact products in bf16 and in fp16, whatever the processor has, so a module in 16 bits stays in 16
bits. The tests of the rule state the other machine. `tests/kernels/cpu/test_matmul_16bit.py` tests what is measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_qlora.kernels.cpu import matmul_16bit
from lightning_qlora.kernels.cpu.matmul_16bit import Products

FAST = Products(slowdown=1.0, error=0.5)
SLOW = Products(slowdown=40.0, error=0.5)
measured = matmul_16bit._measured  # what this processor has


def state(machine: Products) -> None:
    """Let this process, and those that it forks, take these products for the measured ones, in both types."""
    matmul_16bit._measured = lambda dtype, onednn: machine


@contextmanager
def stated(machine: Products) -> Iterator[None]:
    before = matmul_16bit._measured
    state(machine)
    try:
        yield
    finally:
        matmul_16bit._measured = before
