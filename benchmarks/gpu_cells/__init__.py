"""The cells of `benchmarks.gpu_day`: the parts of the GPU measurements, in order of value.

A cell is a generator function `measure(device, small)` that yields rows of results (dicts) as soon as it has them. With
`small` the shapes are tiny and the device may be a CPU, to test the code. `python -m benchmarks.gpu_cells NAME` runs
one cell in this process.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

Row = dict[str, Any]
ROW = "@row "  # prefix of an output line that contains a row as JSON


@dataclass(frozen=True)
class Cell:
    """One part of the measurements.

    Attributes:
        name: Its name in the results.
        function: "module:function" in this folder.
        estimate: Estimated seconds on an H100.
        limit: Seconds after which its process is killed.
        about: What it measures.
    """

    name: str
    function: str
    estimate: int
    limit: int
    about: str

    def load(self) -> Callable[[torch.device, bool], Iterator[Row]]:
        """The function."""
        module, _, name = self.function.partition(":")
        function: Callable[[torch.device, bool], Iterator[Row]] = getattr(
            importlib.import_module(f"{__name__}.{module}"), name
        )
        return function


CELLS = (
    Cell("check", "check:measure", 40, 300, "the check of all kernels at the first use of a card, seconds"),
    Cell("card", "card:measure", 25, 60, "versions, copy bandwidth, rate of a bf16 product"),
    Cell("tests_training", "tests:training", 120, 260, "GPU tests of the plugin: Trainer, Fabric, resume, compile"),
    Cell("tests_kernels", "tests:kernels", 100, 200, "GPU tests of the ops against the reference"),
    Cell("experts", "experts:measure", 60, 180, "experts of a mixture together against one by one, on one block"),
    Cell("tests_optim", "tests:optim", 45, 120, "GPU tests of paging; at most 1 GiB of unified memory"),
    Cell("tiles", "tiles:measure", 210, 330, "search for the tiles of the layer's kernels; writes tiles.json"),
    Cell("decode", "decode:measure", 30, 90, "decoding against a copy of as many bytes; quantizing an 8B model"),
    Cell("layer", "layer:measure", 60, 150, "one layer with an adapter, 1 to 4096 rows"),
    Cell("half", "half:measure", 40, 120, "a layer in fp16 with a power of two, bf16 and fp32: time and error"),
    Cell("step", "step:against_dense", 75, 180, "training step of an 8B-shaped Llama against PEFT on bf16"),
    Cell(
        "step_4bit",
        "step:against_4bit",
        120,
        240,
        "the same step against PEFT + bitsandbytes and an Unsloth-style layer",
    ),
    Cell("largest", "largest:measure", 90, 180, "training step of a 65B-shaped Llama, 1 x 512 tokens, under 48 GB"),
    Cell("growing", "growing:measure", 90, 200, "growing batches of an 8B-shaped Llama in 24 GiB, by recomputation"),
    Cell("paging", "paging:measure", 45, 120, "paged optimizer state: first step, prefetch, pinned copies"),
    Cell("launches", "launches:measure", 45, 120, "kernel launches and host time of a layer, by the profiler"),
    Cell("sanitizer", "sanitizer:measure", 120, 240, "compute-sanitizer's memcheck over every kernel, small shapes"),
)
