"""The search for tiles (`benchmarks.tiles`), which writes the entries of this card."""

import subprocess
import sys
from collections.abc import Iterator

import torch

from benchmarks.gpu_cells import Row
from benchmarks.measure import ROOT
from lightning_qlora.kernels.triton import launch
from lightning_qlora.kernels.verdict import verdict


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """The lines that the search prints, and tiles.json, which `gpu_day` restores before a later run."""
    if device.type != "cuda":
        yield {"skipped": "tiles are measured on a GPU"}
        return
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.tiles"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as search:
        for line in search.stdout or ():
            print(line, end="", flush=True)
            yield {"line": line.strip()}
    if search.returncode:
        raise RuntimeError(f"the search ended with status {search.returncode}.")
    yield {"target": launch.target(device), "tiles_json": launch.FILE.read_text()}
    for op, why in verdict(device).items():  # now, or the first cell that uses the new tiles would wait for it
        if why:
            yield {"failure": f"{op}, with these tiles: {why}"}
