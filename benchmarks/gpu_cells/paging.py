"""The cost of paging optimizer state: the first step, a prefetch of resident pages, pinned copies, later steps.

At most half a GiB of unified memory is allocated at a time.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext

import torch

from benchmarks.gpu_cells import Row, memory
from benchmarks.timing import Function, synchronize, times
from lightning_qlora.optim.host_memory import ManagedPool, why_not_managed
from lightning_qlora.optim.pager import Pager

BYTES = 512 << 20
TENSORS = 224  # one for the adapter of each linear layer of an 8B model


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """GB/s of copies and prefetches; milliseconds of a step with the state kept on the device, managed and pinned."""
    kinds = ["on the device"] if device.type == "cuda" else ["on the device", "pinned"]
    if device.type == "cuda":
        yield from _pinned_copies(device, BYTES)
        reason = why_not_managed(device)
        if reason is None and torch.cuda.mem_get_info(device)[0] > 4 * memory.MANAGED_LIMIT:
            yield from _prefetches(device, BYTES)
            kinds.append("managed")
        else:
            yield {"managed": f"skipped: {reason or 'too little memory is free'}"}
        kinds.append("pinned")
    else:
        yield {"copies": "skipped: no GPU"}
    for kind in kinds:
        yield _steps(kind, device, small)
        gc.collect()
        memory.reset_peak(device)


def _pinned_copies(device: torch.device, nbytes: int) -> Iterator[Row]:
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.ones(nbytes, dtype=torch.uint8, device=device)
    functions: dict[str, Function] = {
        "to the device": lambda: there.copy_(host, non_blocking=True),
        "to the host": lambda: host.copy_(there, non_blocking=True),
    }
    for name, values in times(functions, device, rounds=5, flush=False).items():
        yield {"pinned_copy": name, "gb_per_second": nbytes / statistics.median(values) / 1e9}


def _prefetches(device: torch.device, nbytes: int) -> Iterator[Row]:
    pool = ManagedPool(device)
    tensor = pool.new_tensor(torch.ones(nbytes, dtype=torch.uint8), torch.uint8)
    for name in ("first", "resident"):
        synchronize(device)
        start = time.perf_counter()
        pool.prefetch([tensor])
        synchronize(device)
        took = time.perf_counter() - start
        yield {"prefetch": name, "milliseconds": 1e3 * took, "gb_per_second": nbytes / took / 1e9}


def _steps(kind: str, device: torch.device, small: bool) -> Row:
    """Milliseconds of AdamW over as many elements as adapters of rank 16 of an 8B model have: 336 MB of state."""
    numel = 8192 if small else 187_500
    params = [torch.nn.Parameter(torch.randn(numel, device=device)) for _ in range(2 if small else TENSORS)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    pager = Pager()
    with memory.paging_through_pinned_memory() if kind == "pinned" else nullcontext():
        if kind != "on the device":
            pager.attach(optimizer)
        synchronize(device)
        start = time.perf_counter()
        optimizer.step()
        synchronize(device)
        first = time.perf_counter() - start
        later = times({"step": optimizer.step}, device, rounds=2 if small else 7, flush=False, head_start=0)["step"]
        report = pager.report()
        pager.close()
    return {
        "state": kind,
        "first_step_ms": 1e3 * first,
        "step_ms": 1e3 * statistics.median(later),
        "paged_bytes": report.nbytes,
        "paged_as": report.kind,
    }
