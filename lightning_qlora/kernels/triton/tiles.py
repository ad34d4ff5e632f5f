"""Which tile a kernel runs with: read from `tiles.json`, by kernel, device and number of rows.

The file is data, written by `python -m benchmarks.tiles` on each kind of card: nothing is timed while a model trains.
Its rows read {kernel: {target: [{"rows": largest number of rows, constants of the kernel, "num_warps", ...}]}};
a target without rows of its own uses those of "default", and a number of rows beyond the last has no tile.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE: dict[str, dict[str, list[dict[str, int]]]] = json.loads(Path(__file__).with_name("tiles.json").read_text())


@cache
def target(device: torch.device) -> str:
    """The name of a device's instruction set: "sm_90", "gfx942"; "interpreter" for a CPU under TRITON_INTERPRET=1."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def launch_options(kernel: str, device: torch.device, rows: int = 0) -> dict[str, Any]:
    """A fresh dict of the kernel's constants and launch options; empty if so many rows have no tile."""
    targets = TABLE[kernel]
    for tile in targets.get(target(device), targets["default"]):
        if rows <= tile.get("rows", rows):
            return {name: value for name, value in tile.items() if name != "rows"}
    return {}
