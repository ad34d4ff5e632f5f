"""The matmuls of a training step in each type on this CPU, in GFLOP/s: what docs/processors.md has.

    python -m benchmarks.matmul_types [--threads 2]

16-bit products that are slow take small matrices, or they would take minutes.
"""

import argparse

import torch

from benchmarks.measure import machine, table
from benchmarks.timing import seconds

LARGE = 512, 1024
SMALL = 64, 512
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def rates(dtype: torch.dtype, rows: int, width: int) -> list[float]:
    """GFLOP/s of x W^T, dY W and dY^T x for x and dY [rows, width] and W [width, width]."""
    x, y = torch.randn(2, rows, width).to(dtype)
    weight = torch.randn(width, width).to(dtype)
    products = {
        "forward": lambda: x @ weight.T,
        "dX": lambda: y @ weight,
        "dW": lambda: y.T @ x,
    }
    taken = seconds(products, torch.device("cpu"), rounds=5)
    return [2e-9 * rows * width * width / taken[name] for name in products]


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for dtype in TYPES:
        is_slow = min(rates(dtype, *SMALL)) < min(rates(torch.float32, *SMALL)) / 5
        size = SMALL if is_slow else LARGE
        name = f"{str(dtype).removeprefix('torch.')}, {size[0]} x {size[1]}"
        rows.append([name, *(f"{rate:.3g}" for rate in rates(dtype, *size))])
    print(f"`python -m benchmarks.matmul_types --threads {options.threads}` on {machine()}\n")
    print(table(["type", "forward, x W^T", "dX = dY W", "dW = dY^T x"], rows))


if __name__ == "__main__":
    main()
