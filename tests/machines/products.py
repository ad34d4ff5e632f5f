"""Whether products of 16-bit matrices are slow is an input of the tests, not a property of the processor they run on.

A test has fast and exact products in bf16 and in fp16, whatever the processor has, so a module in 16 bits stays in 16
bits. The tests of the rule state the other machine. `tests/kernels/cpu/test_products.py` tests what is measured.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_qlora.kernels.cpu import products
from lightning_qlora.kernels.cpu.products import Products

FAST = Products(slowdown=1.0, error=0.5)
SLOW = Products(slowdown=40.0, error=0.5)
measured = products._measured  # what this processor has


def state(machine: Products) -> None:
    """Let this process, and those that it forks, take these products for the measured ones, in both types."""
    products._measured = lambda dtype, onednn: machine


@contextmanager
def stated(machine: Products) -> Iterator[None]:
    before = products._measured
    state(machine)
    try:
        yield
    finally:
        products._measured = before
