"""Timing on a device: candidates alternate, so that a change of the clock frequency affects all of them; medians.

`seconds` measures the time on the device, `call_seconds` the time per call, including the host time of launches.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Function = Callable[[], object]
L2_BYTES = 256 << 20  # larger than the L2 cache of any card (50 MB on an H100)
CYCLES_PER_MS = 2_000_000  # of torch.cuda._sleep, at about 2 GHz


def times(
    functions: Mapping[str, Function],
    device: torch.device,
    rounds: int = 20,
    flush: bool = True,
    head_start: float = 0.5,
) -> dict[str, list[float]]:
    """Seconds of each call of each function, after two calls to warm up.

    Args:
        functions: Name -> function without arguments.
        device: Where they run. CUDA events measure the time on a GPU, the clock on a CPU.
        rounds: Timed calls of each function.
        flush: Overwrite the L2 cache before each call: in a model, a weight is not in the cache when its layer runs.
        head_start: Milliseconds that the GPU waits before each call, so that the host can queue the kernels in the
            meantime. With 0 the result includes the time that the GPU waits for the host.
    """
    for function in functions.values():
        function()
        function()
    cuda = device.type == "cuda"
    cache = torch.empty(L2_BYTES if cuda and flush else 1, dtype=torch.uint8, device=device)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            cache.zero_()
            if cuda:
                torch.cuda.synchronize(device)
                if head_start:
                    torch.cuda._sleep(int(head_start * CYCLES_PER_MS))
            taken[name].append(_once(function, device))
    return taken


def seconds(functions: Mapping[str, Function], device: torch.device, rounds: int = 20) -> dict[str, float]:
    """Median seconds of a call of each function on the device, with a cold cache."""
    return {name: statistics.median(values) for name, values in times(functions, device, rounds).items()}


def call_seconds(
    functions: Mapping[str, Function], device: torch.device, rounds: int = 5, calls: int = 10
) -> dict[str, float]:
    """Median seconds per call in a series of calls, from the first launch to the end of the last kernel."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):  # the first round warms up
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize(device)
            if turn:
                taken[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in taken.items()}


def host_seconds(function: Function, device: torch.device, rounds: int = 30) -> float:
    """Median seconds until a call returns: the host time of its launches, without waiting for the device."""
    function()
    taken = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    synchronize(device)
    return statistics.median(taken)


def synchronize(device: torch.device) -> None:
    """Wait for all kernels of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _once(function: Function, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
