"""Measure the tiles of the layer's kernels on this card and write them into tiles.json: `python -m benchmarks.tiles`.

For each kernel and number of rows the fastest candidate over the shapes is chosen, if it is faster than what runs
without a tile: decoding and cuBLAS for `matmul`, cuBLAS with a separate dropout for the products of the adapter, one
expert after another for `grouped` (all its kernels have one tile). `dequantize` always has one. Candidates are compiled
in parallel first, and those that spill registers are dropped. The file is written after each choice. Run
`make compile-kernels` and `pytest -m gpu tests/kernels` afterwards.
"""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.compiled import compile_launch, recorded
from benchmarks.products import add_matmul_, lora_down, lora_gradients, lora_up
from benchmarks.timing import seconds
from lightning_qlora.kernels import eager, ops
from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.triton import launch
from lightning_qlora.kernels.triton.launch import Tile
from lightning_qlora.kernels.triton.quantize import dequantize_into
from lightning_qlora.quantization.packed_weight import stack_bytes

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
EXPERTS, EXPERT_SHAPES = 64, ((1536, 2048), (2048, 768))  # the shapes of Qwen3-30B-A3B, which has 128 experts
RANK = 64
# For each kernel the largest numbers of rows that its tiles are for (`grouped`: rows of one expert). The last tile is
# also used for more rows, except that of `matmul`.
ROWS = {
    "dequantize": (1,), "matmul": (16, 32, 64, 128), "lora_down": (16, 4096), "lora_up": (16, 4096),
    "lora_gradients": (4096,), "grouped": (16, 128),
}  # fmt: skip


def candidates(kernel: str, rows: int) -> list[Tile]:
    """Tiles worth trying for so many rows."""
    few = rows <= 16
    if kernel == "dequantize":
        return [Tile(WEIGHTS=n, num_warps=w) for n, w in product((1024, 2048, 4096, 8192), (1, 2, 4))]
    if kernel == "matmul":
        sizes = [{"M": min(rows, 64), "N": n, "num_warps": w} for n, w in ((64, 4), (128, 4), (128, 8))]
    elif kernel == "grouped":
        sizes = [
            {"M": m, "N": n, "K": 64, "num_warps": w}
            for m, n, w in product((16,) if few else (32, 64), (64, 128), (4, 8))
        ]
    else:
        other = "K" if kernel == "lora_down" else "N"
        rows_of_tile = ((16, 4),) if few else ((32, 4), (64, 4), (128, 4), (128, 8))
        sizes = [{"M": m, other: n, "num_warps": w} for (m, w), n in product(rows_of_tile, (32, 64, 128))]
    stages = (1, 2) if kernel == "lora_up" else (2, 3)  # its loop over the ranks has one step up to rank 64
    return [Tile(size, num_stages=s) for size, s in product(sizes, stages)]


def calls(kernel: str, rows: int, shape: tuple[int, int], device: torch.device) -> list[Callable[[], Any]]:
    """The kernel on one shape with the tile in the table, and what runs without one if that is another function."""
    if kernel == "grouped":
        return _calls_of_experts(rows, shape, device)
    n, k = shape
    x, h = (torch.randn(rows, size, device=device, dtype=torch.bfloat16) for size in (k, RANK))
    a, seed = torch.randn(RANK, k, device=device), torch.tensor([7])
    if kernel == "lora_down":
        return [partial(lora_down, x, a, 1.0, 0.05, seed)]
    if kernel == "lora_up":
        return [partial(lora_up, h, a.T, x)]
    if kernel == "lora_gradients":
        y, b = torch.randn(rows, n, device=device, dtype=torch.bfloat16), torch.randn(n, RANK, device=device)
        return [partial(lora_gradients, h, x, a, h, y, b, 0.5, 0.05, seed)]
    weight = ops.quantize(torch.randn(n, k, device=device, dtype=torch.bfloat16)).to_bytes()
    y, dense = x.new_zeros(rows, n), x.new_empty(n * k)
    if kernel == "dequantize":
        return [partial(dequantize_into, dense, weight), partial(eager.dequantize, weight, dense.dtype)]
    decoded = lambda: y.addmm_(x, dequantize_into(dense, weight).view(weight.shape).T)  # noqa: E731
    return [partial(add_matmul_, y, x, weight), decoded]


def _calls_of_experts(rows: int, shape: tuple[int, int], device: torch.device) -> list[Callable[[], Any]]:
    """Forward and backward of all experts together, and of one after another."""
    n, k = shape
    x, grad = (torch.randn(EXPERTS * rows, size, device=device, dtype=torch.bfloat16) for size in (k, n))
    ends = torch.arange(rows, len(x) + 1, rows, device=device, dtype=torch.int32)
    weight = stack_bytes([ops.quantize(torch.randn(n, k, device=device)).to_bytes() for _ in range(EXPERTS)])
    lora_a, lora_b = (torch.randn(EXPERTS, *size, device=device) for size in ((RANK, k), (n, RANK)))

    def together() -> None:
        lora = LoRA(lora_a, lora_b, 0.5)
        _, xa = kernels.grouped_linear(x, ends, weight, lora)
        kernels.grouped_linear_backward(grad, x, xa, ends, weight, lora)

    def one_by_one() -> None:
        for part, of_part, matrix, a, b in zip(
            x.split(rows), grad.split(rows), weight.unbind(), lora_a, lora_b, strict=True
        ):
            lora = LoRA(a, b, 0.5)
            plan = kernels.plan(part, lora, matrix)
            xa = plan.lora_project(part, lora)
            plan.linear_into(part.new_empty(rows, n), part, xa, matrix, None, lora)
            plan.linear_backward(of_part, part, xa, matrix, lora, True)

    return [together, one_by_one]


def with_tile(kernel: str, tile: Tile | None, call: Callable[[], Any]) -> Any:
    """Call with this tile in the table; None: with no tile, so that torch computes the product."""
    launch.TABLE[kernel] = {"default": [tile] if tile else []}
    return call()


def problem(kernel: str, rows: int, target: str, tile: Tile) -> str:
    """Why a candidate is of no use, empty if it compiles and spills nothing; it is then in Triton's cache on disk."""
    # Sizes that Triton takes for those that are measured: divisible by 16, and of products, as many shares.
    shape = (128, 4096) if kernel == "grouped" else SHAPES[0]
    with recorded(target) as launches:
        with_tile(kernel, tile, calls(kernel, rows, shape, torch.device("cpu"))[0])
    for each in launches:
        try:
            report = compile_launch(each, target)
        except Exception as error:  # the compiler raises many types
            return f"{type(error).__name__}: {error}"
        if report.shared_kib > report.shared_limit_kib:
            return "needs more shared memory than the card has"
        if report.spill_bytes:
            return "spills registers"
    return ""


def measure(kernel: str, rows: int, usable: list[Tile], device: torch.device) -> dict[str, float]:
    """Seconds over all shapes of each candidate, by its JSON, and of "torch"."""
    total = dict[str, float]()
    for shape in EXPERT_SHAPES if kernel == "grouped" else SHAPES:
        call, *decoded = calls(kernel, rows, shape, device)
        functions = {json.dumps(tile): partial(with_tile, kernel, tile, call) for tile in usable}
        functions["torch"] = decoded[0] if decoded else partial(with_tile, kernel, None, call)
        for name, took in seconds(functions, device, rounds=10).items():
            total[name] = total.get(name, 0.0) + took
    return total


def main() -> int:
    """Measure, write, and print what was chosen."""
    if not torch.cuda.is_available():
        print("There is no GPU here, and tiles are measured on one.", file=sys.stderr)
        return 1
    target = launch.target(torch.device("cuda"))
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for kernel, numbers in ROWS.items():
            chosen: list[Tile] = []
            for rows in numbers:
                tried = candidates(kernel, rows)
                problems = pool.map(partial(problem, kernel, rows, target), tried)
                usable = [tile for tile, why in zip(tried, problems, strict=True) if not why]
                if not usable:
                    print(f"{kernel}, {rows} rows: no candidate compiles without spilling", flush=True)
                    break
                took = measure(kernel, rows, usable, torch.device("cuda"))
                by_torch = took.pop("torch")
                best = min(took, key=lambda name: took[name])
                print(
                    f"{kernel}, {rows} rows: {1e6 * took[best]:.0f} us with {best}, torch {1e6 * by_torch:.0f} us",
                    flush=True,
                )
                is_last = rows == numbers[-1]
                # For few rows an adapter's product is chosen by its launches: torch needs several.
                is_chosen = took[best] < by_torch or kernel == "dequantize" or (kernel != "matmul" and not is_last)
                if is_chosen:
                    limit = {} if kernel != "matmul" and is_last else {"up_to": rows}
                    chosen.append(Tile(limit, **json.loads(best)))
                table = json.loads(launch.FILE.read_text())
                table[kernel][target] = chosen
                launch.FILE.write_text(_text(table))
                if not is_chosen:
                    break
    return 0


def _text(table: dict[str, Any]) -> str:
    """JSON with a line for each tile."""
    kernels = []
    for kernel, targets in table.items():
        lines = []
        for target, entries in targets.items():
            rows = ",".join(f"\n      {json.dumps(tile)}" for tile in entries)
            lines.append(f'    "{target}": [{rows}' + ("\n    ]" if entries else "]"))
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
