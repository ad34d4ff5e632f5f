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


class Tile(dict[str, int]):
    """An entry of the table, not to be changed. Hashed by identity, so that launches can be cached by their tile."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


def read(file: Path) -> dict[str, dict[str, list[Tile]]]:
    """The table in a file."""
    targets = json.loads(file.read_text()).items()
    return {kernel: {name: [*map(Tile, tiles)] for name, tiles in table.items()} for kernel, table in targets}


FILE = Path(__file__).with_name("tiles.json")
TABLE = read(FILE)
NO_TILE = Tile()


@cache
def target(device: torch.device) -> str:
    """The name of a device's instruction set: "sm_90", "gfx942"; "interpreter" for a CPU under TRITON_INTERPRET=1."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def find_tile(kernel: str, device: torch.device, size: int = 0) -> Tile:
    """The entry of the table; empty if there is none for so large a size."""
    targets = TABLE[kernel]
    for tile in targets.get(target(device), targets["default"]):
        if size <= tile.get("up_to", size):
            return tile
    return NO_TILE
