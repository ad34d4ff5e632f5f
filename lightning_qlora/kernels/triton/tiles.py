"""Which tile a kernel runs with: read from `tiles.json`, by kernel, device and size.

The file is data: nothing is timed while a model trains (`python -m benchmarks.tiles` measures the rows of `matmul`).
It reads {kernel: {target: [{"up_to": size, constants of the kernel, "num_warps", ...}]}}, the size being the number of
rows of `matmul` and the block size of `quantize`. The first entry that reaches to the size counts, a size beyond the
last has no tile, and a target without entries of its own takes those of "default".
"""

import json
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("tiles.json")
TABLE: dict[str, dict[str, list[dict[str, int]]]] = json.loads(FILE.read_text())


@cache
def target(device: torch.device) -> str:
    """The name of a device's instruction set: "sm_90", "gfx942"; "interpreter" for a CPU under TRITON_INTERPRET=1."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def launch_options(kernel: str, device: torch.device, size: int = 0) -> dict[str, Any]:
    """A fresh dict of the kernel's constants and launch options; empty if so large a size has no tile."""
    targets = TABLE[kernel]
    for tile in targets.get(target(device), targets["default"]):
        if size <= tile.get("up_to", size):
            return {name: value for name, value in tile.items() if name != "up_to"}
    return {}


def launching_on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, wherever the tensors are: make theirs the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
