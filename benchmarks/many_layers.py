"""Milliseconds a layer of a conversion, a save, a load and a merge, for modules of 250 to 50,000 linear layers.

    python -m benchmarks.many_layers [--layers 250 2500 10000 50000]

The aim is a time that does not grow with the number of layers: it grows where code looks through the module for each
layer, as torch's `load_state_dict` does (each child of a list looks through all keys), so of long flat lists the load
is left out. The layers are 32 x 32; quantizing them is measured alone, and subtracted from the conversion.
`flat`: a list of layers. `nested`: blocks of eight layers, in blocks of eight blocks, and so on.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_qlora import QLoRALinear, convert, load_adapter, merge, save_adapter
from lightning_qlora.config import QLoRAConfig

WIDTH = 32
RANK = 4
LONGEST = 2500  # flat list that is loaded
COLUMNS = (
    "conversion beside quantizing",
    "state_dict",
    "load",
    "torch's, dense",
    "save_adapter",
    "load_adapter",
    "merge",
)


def flat(layers: int) -> nn.Module:
    """A list of layers."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))


def nested(layers: int) -> nn.Module:
    """Eight layers in a block, eight blocks in a stage, and so on."""
    level: list[nn.Module] = [nn.Linear(WIDTH, WIDTH) for _ in range(layers)]
    while len(level) > 1:
        level = [nn.Sequential(*level[first : first + 8]) for first in range(0, len(level), 8)]
    return level[0]


def milliseconds(action: Callable[[], Any], layers: int) -> float:
    """Of an action on one processor, for each layer."""
    start = time.process_time()
    action()
    return 1000 * (time.process_time() - start) / layers


def quantizing(layers: int) -> float:
    """Milliseconds a layer of `QLoRALinear.from_linear` alone."""
    dense = [nn.Linear(WIDTH, WIDTH) for _ in range(layers)]
    config = QLoRAConfig(r=RANK)
    return milliseconds(lambda: [QLoRALinear.from_linear(each, config, "", None, "") for each in dense], layers)


def row(build: Callable[[int], nn.Module], layers: int) -> list[str]:
    """The cells of the table."""
    module = build(layers)
    loads = build is nested or layers <= LONGEST
    dense = module.state_dict()
    of_dense = milliseconds(lambda: loads and module.load_state_dict(dense), layers)
    times = [milliseconds(lambda: convert(module, r=RANK), layers) - quantizing(layers)]
    state: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for action in (
            lambda: state.update(module.state_dict()),
            lambda: loads and module.load_state_dict(state),
            lambda: save_adapter(module, folder),
            lambda: load_adapter(module, folder),
            lambda: merge(module),
        ):
            times.append(milliseconds(action, layers))
    times.insert(3, of_dense)
    cells = [f"{time:.2f}" for time in times]
    if not loads:
        cells[2:4] = "-", "-"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[250, 2500, 10000, 50000])
    layers = parser.parse_args().layers
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    row(flat, 10)  # what is computed once
    print("| module | layers |", " | ".join(COLUMNS), "|")
    print("| --- |" + " ---: |" * (1 + len(COLUMNS)))
    for build in (flat, nested):
        for count in layers:
            print("|", " | ".join([build.__name__, f"{count:,}", *row(build, count)]), "|", flush=True)


if __name__ == "__main__":
    main()
