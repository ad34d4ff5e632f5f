"""How fast and how exact this CPU's products of 16-bit matrices are, measured once in a process.

torch has fast ones only where oneDNN has: x86 with AVX-512, ARM with bf16 instructions. Elsewhere a product with a
matrix that is not transposed, such as dX = dY W, takes 30 to 170 times as long as in fp32. On ARM with bf16
instructions torch 2.10 rounds the sums of a product several times.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

ROWS, WIDTH = 16, 256  # of the product that is timed
ROUNDS = 10  # the shortest time counts
SLOW = 15.0  # times fp32: fast kinds have 1 to 7 in so small a product (1 to 1.3 in larger ones), slow ones 33 to 90
INPUTS = 2048  # of the product whose error is measured
INEXACT = 0.75  # eps: one rounding is 0.5; several, on ARM with bf16 in torch 2.10, were 1.3


class Products(NamedTuple):
    slowdown: float  # time of the slower one of x W^T and dY W, divided by that in fp32; 1.0 is the least
    error: float  # the largest error of an element, divided by it, in eps of the type

    @property
    def is_slow(self) -> bool:
        """Whether fp32 is the better type to compute in."""
        return self.slowdown > SLOW or self.error > INEXACT

    def __str__(self) -> str:
        if self.slowdown > SLOW:
            return f"a matmul takes {self.slowdown:.0f} times as long as in fp32"
        if self.error > INEXACT:
            return f"the sums of a matmul are rounded several times (error {self.error:.1f} eps; 0.5 with one rounding)"
        return f"matmuls are fast and rounded once (error {self.error:.1f} eps)"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def products(dtype: torch.dtype) -> Products:
    """What was measured for `dtype`, as text a part of a sentence; the first call measures, in some milliseconds."""
    if not dtype.is_floating_point or dtype.itemsize != 2:
        return Products(1.0, 0.5)
    return _measured(dtype, torch.backends.mkldnn.enabled)


@cache
def _measured(dtype: torch.dtype, onednn: bool) -> Products:
    """In a new thread, which has no autocast, inference mode, default device or mode of torch."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_measure, dtype).result()


def _measure(dtype: torch.dtype) -> Products:
    """With one thread: several, on a busy machine, take as long as the last of them waits for a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # only of this Python thread, and of those that begin meanwhile
    try:
        return Products(_slowdown(dtype), _error(dtype))
    finally:
        torch.set_num_threads(threads)


def _slowdown(dtype: torch.dtype) -> float:
    x, weight = (torch.ones(rows, WIDTH, dtype=torch.float32, device="cpu") for rows in (ROWS, WIDTH))
    operands = [(x.to(each), matrix.to(each)) for matrix in (weight.T, weight) for each in (torch.float32, dtype)]
    # Types in turns: what else runs on the machine slows both.
    rounds = [[_seconds(*factors) for factors in operands] for _ in range(ROUNDS)]
    best: list[float] = [min(times) for times in zip(*rounds, strict=True)]
    return max(1.0, best[1] / best[0], best[3] / best[2])


def _seconds(x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    torch.mm(x, weight)
    return time.perf_counter() - start


def _error(dtype: torch.dtype) -> float:
    """The largest error of x W^T, of W transposed and not, in eps."""
    generator = torch.Generator("cpu").manual_seed(0)
    x, weight = torch.randn(2, ROWS, INPUTS, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    exact = x.double() @ weight.double().T
    typical = exact.square().mean().sqrt()  # where large products cancel, the errors are those of the large ones
    errors = [
        ((x @ transposed).double() - exact).abs() / exact.abs().clamp_min(typical)
        for transposed in (weight.T, weight.T.contiguous())
    ]
    return torch.stack(errors).max().item() / torch.finfo(dtype).eps
