"""Measure the tiles of the fused product on this card and write its rows into tiles.json: `python -m benchmarks.tiles`.

For each number of rows the candidate that is fastest over the shapes is taken, as long as the fused product beats
decoding and cuBLAS there; beyond the largest such number the layer decodes. Run `make compile-kernels` afterwards.
"""

import json
import sys
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.timing import seconds
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.triton import tiles
from lightning_qlora.kernels.triton.dequantize import dequantize_into
from lightning_qlora.kernels.triton.matmul import add_matmul_

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192))
ROWS = (16, 32, 64, 128)


def candidates(rows: int) -> list[dict[str, int]]:
    """Tiles worth trying for so many rows."""
    return [
        {"up_to": rows, "M": min(rows, 64), "N": n, "PROGRAMS": programs, "num_warps": warps, "num_stages": stages}
        for n, programs, warps, stages in product((32, 64, 128), (128, 256, 512, 1024), (4, 8), (2, 3, 4))
    ]


def times(rows: int) -> dict[str, float]:
    """Seconds over all shapes by each candidate, named by its JSON, and by decoding ("decoded")."""
    device = torch.device("cuda")
    total: dict[str, float] = {}
    for n, k in SHAPES:
        weight = ops.quantize(torch.randn(n, k, device=device, dtype=torch.bfloat16)).to_bytes()
        x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
        y, dense = x.new_zeros(rows, n), x.new_empty(n * k)
        functions: dict[str, Any] = {
            "decoded": lambda y=y, x=x, dense=dense, weight=weight: y.addmm_(
                x, dequantize_into(dense, weight).view(weight.shape).T
            )
        }
        for tile in candidates(rows):
            functions[json.dumps(tile)] = partial(_with_tile, tile, y, x, weight)
        for name, took in seconds(functions, device, rounds=10).items():
            total[name] = total.get(name, 0.0) + took
    return total


def _with_tile(tile: dict[str, int], *arguments: Any) -> None:
    tiles.TABLE["matmul"] = {"default": [tile]}
    add_matmul_(*arguments)


def main() -> int:
    """Measure, write, and print what was chosen."""
    if not torch.cuda.is_available():
        print("There is no GPU here, and tiles are measured on one.", file=sys.stderr)
        return 1
    chosen = []
    for rows in ROWS:
        took = times(rows)
        decoded = took.pop("decoded")
        best = min(took, key=lambda name: took[name])
        print(f"{rows} rows: decoded {1e6 * decoded:.0f} us, fused {1e6 * took[best]:.0f} us with {best}")
        if took[best] >= decoded:
            break
        chosen.append(json.loads(best))
    table = json.loads(tiles.FILE.read_text())
    table["matmul"][tiles.target(torch.device("cuda"))] = chosen
    tiles.FILE.write_text(_text(table))
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
