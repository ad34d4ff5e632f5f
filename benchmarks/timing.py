"""Timing on a device: candidates take turns, so that a change of the card's clock meets all of them; medians."""

import time
from collections.abc import Callable

import torch

Function = Callable[[], object]


def seconds(functions: dict[str, Function], device: torch.device, rounds: int = 20) -> dict[str, float]:
    """Median seconds of a call of each function, after two calls to warm up."""
    for function in functions.values():
        function()
        function()
    # A weight is not in the cache when its layer's turn comes: write over the cache (50 MB on an H100) each time.
    flush = torch.empty(256 << 20 if device.type == "cuda" else 1, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            flush.zero_()
            times[name].append(_once(function, device))
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def _once(function: Function, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
