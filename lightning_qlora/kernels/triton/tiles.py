"""The tile sizes of the kernels, read from `tiles.json` by kernel, device and problem size.

The file is data: nothing is timed while a model trains (`python -m benchmarks.tiles` measures the rows of `matmul`).
Its form is {kernel: {target: [{"up_to": size, constants of the kernel, "num_warps", ...}]}}, where the size is the
number of rows of x, and the block size for `quantize`. The first entry with size <= up_to is used. For a larger size
there is no tile, and for a target without an entry "default" is used.
"""

import json
from functools import cache
from pathlib import Path

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


def find_tile(kernel: str, device: torch.device, size: int = 0) -> dict[str, int]:
    """The entry of the table, not to be changed; empty if there is none for so large a size."""
    targets = TABLE[kernel]
    for tile in targets.get(target(device), targets["default"]):
        if size <= tile.get("up_to", size):
            return tile
    return {}
