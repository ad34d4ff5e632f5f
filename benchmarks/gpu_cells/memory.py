"""Device memory in bytes: allocated and reserved by torch, and in use according to the driver."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.gpu_cells import Row
from lightning_qlora.optim import optimizer_pages

MANAGED_LIMIT = 1 << 30  # most bytes of unified memory that a cell allocates


def allocated(device: torch.device) -> int:
    """Bytes of all tensors on the device; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Return cached memory to the driver and restart the peak counters."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_allocated(device: torch.device) -> int:
    """Most bytes of tensors since `reset_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def peaks(device: torch.device) -> Row:
    """Peaks since `reset_peak`, in bytes.

    "device_bytes" is the driver's figure and includes the CUDA context. It is read now and still is the peak, because
    torch's allocator returns no memory to the driver between steps.
    """
    if device.type != "cuda":
        return {"allocated_bytes": 0, "reserved_bytes": 0, "device_bytes": 0, "device_bytes_by": "no GPU"}
    torch.cuda.synchronize(device)
    try:
        used = torch.cuda.device_memory_used(device)
        by = "NVML"
    except Exception:  # pynvml is not installed, or NVML does not answer in this container
        free, total = torch.cuda.mem_get_info(device)
        used = total - free
        by = "cudaMemGetInfo"
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "device_bytes": used,
        "device_bytes_by": by,
    }


@contextmanager
def paging_through_pinned_memory() -> Iterator[None]:
    """Within it optimizer state pages through pinned memory, as on devices without unified memory."""
    before = optimizer_pages.why_not_managed  # type: ignore[attr-defined]
    optimizer_pages.why_not_managed = lambda device: "the benchmark asks for pinned memory"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        optimizer_pages.why_not_managed = before  # type: ignore[attr-defined]
