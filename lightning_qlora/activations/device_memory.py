"""What a process has of a device: bytes in use, at the peak, and available."""

import ctypes
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

C_LIBRARY: Any = ctypes.CDLL(None) if os.name == "posix" else None


class MallocInfo(ctypes.Structure):
    """What glibc says of its memory: `struct mallinfo2` of malloc.h (glibc 2.33)."""

    _fields_ = [(f"_{number}", ctypes.c_size_t) for number in range(8)] + [
        ("fordblks", ctypes.c_size_t),  # free, in all arenas
        ("keepcost", ctypes.c_size_t),
    ]


class Memory(NamedTuple):
    """Bytes of this process on a device."""

    used: int  # now
    peak: int  # the most so far
    available: int  # for this process, what it uses included


def memory_of(device: torch.device) -> Memory | None:
    """What a process has of a device; None where it can't be read (CPUs without /proc)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        available = free + torch.cuda.memory_reserved(device) + _managed_on(device)
        return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), available)
    if device.type != "cpu":
        return None
    try:
        text = Path("/proc/self/status").read_text() + Path("/proc/meminfo").read_text()
    except OSError:
        return None
    row = {name: 1024 * int(number) for name, number in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    free = row["MemAvailable"]
    with suppress(OSError, ValueError):  # the limit of a container; of what it counts the system can drop files
        limit, current = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        files = re.search(r"^inactive_file (\d+)$", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
        free = min(free, limit - current + int(files[1] if files else 0))
    return Memory(max(row["VmRSS"] - _held_back(), 0), row["VmHWM"], row["VmRSS"] + free)


# Of each device: pools of unified memory (`nbytes`), and what others than torch had before the pools had any.
_managed: dict[torch.device, tuple[WeakSet[Any], int]] = {}


def count_managed(pool: Any, device: torch.device) -> None:
    """Count the pages of a pool as available, before its first ones: the driver moves them when torch needs memory."""
    pools, _ = _managed.get(device, (WeakSet(), 0))
    if not pools:
        _managed[device] = pools, _of_others(device)
    pools.add(pool)


def _of_others(device: torch.device) -> int:
    """Bytes that torch has not: the driver's, those of other processes, unified memory that is on the device."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def _managed_on(device: torch.device) -> int:
    """Bytes of unified memory that are on the device, as far as one can see: CUDA does not say where a page is."""
    pools, before = _managed.get(device, (WeakSet(), 0))
    nbytes = int(sum(pool.nbytes for pool in pools))
    return nbytes and max(0, min(nbytes, _of_others(device) - before))


def _held_back() -> int:
    """Bytes that were freed and that glibc keeps for the next allocations; `malloc_trim` would cost 11% of a step."""
    if not hasattr(C_LIBRARY, "mallinfo2"):
        return 0
    return int(ctypes.CFUNCTYPE(MallocInfo)(("mallinfo2", C_LIBRARY))().fordblks)


class HostCopies:
    """Copies between a CUDA device and page-locked host memory, on a stream of their own: they run beside kernels.

    One stream for both ways, so that memory which was given back is used in order.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None

    @torch.no_grad()
    def start(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """Start to copy (target, source) and return the end of it."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        # Kernels launched before may still write the source, or read the memory that torch now uses for the target.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, end: Any) -> None:
        """Let kernels that are launched from now on wait for the end of a copy."""
        torch.cuda.current_stream(self.device).wait_event(end)


def reset_peak(device: torch.device) -> None:
    """Let `Memory.peak` begin again: loading may have taken more than a step does."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        with suppress(OSError):  # then the peak so far counts, and fewer blocks keep their activations
            Path("/proc/self/clear_refs").write_text("5")
