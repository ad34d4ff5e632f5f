"""Run one cell in this process: `python -m benchmarks.gpu_cells NAME [--small]`."""

import argparse
import json

import torch

from benchmarks.gpu_cells import CELLS, ROW


def run_cell(name: str, small: bool) -> None:
    """Run a cell and print each row at once, as one line of JSON after a prefix."""
    cell = next(cell for cell in CELLS if cell.name == name)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # the shapes are too small for several threads
    torch.manual_seed(0)
    for row in cell.load()(device, small):
        print(ROW + json.dumps(row), flush=True)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cell", choices=[cell.name for cell in CELLS])
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.small:
        parser.error("there is no GPU here; --small tries the cell with tiny shapes on the CPU.")
    run_cell(options.cell, options.small)


if __name__ == "__main__":
    main()
