"""The check of every op at the first use of a card, and the seconds that it takes."""

import time
from collections.abc import Iterator

import torch

from benchmarks.gpu_cells import Row
from lightning_qlora.kernels import eager
from lightning_qlora.kernels.self_test import faults
from lightning_qlora.kernels.verdict import verdict


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """Seconds of the first check, and of another one for which all kernels are compiled; what each op does wrong."""
    for name in ("first", "again"):
        start = time.perf_counter()
        if device.type == "cuda":
            failures = verdict(device, repeat=True)
        else:  # no kernels: the eager backend
            failures = faults(eager, device)
        yield {"check": name, "seconds": time.perf_counter() - start}
    for op, why in failures.items():
        if why:
            yield {"failure": f"{op}: {why}"}
