"""What a process has of a device: bytes in use, at the peak, and available; and copies to page-locked host memory."""

import gc
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """Bytes of this process on a device."""

    used: int  # now
    peak: int  # the most so far
    available: int  # for this process, what it uses included


def memory_of(device: torch.device, begins: bool = False) -> Memory | None:
    """What a process has of a device; None where it can't be read (CPUs without /proc).

    `begins`: its peak begins again, since loading may have had more.
    """
    if device.type == "cpu":
        if begins:
            with suppress(OSError):  # then the peak so far counts, and fewer blocks keep their activations
                Path("/proc/self/clear_refs").write_text("5")
        used, peak = (_of_proc("self/status", key) for key in ("VmRSS", "VmHWM"))
        return None if used is None or peak is None else Memory(used, peak, int(used + free_on_host()))
    if device.type != "cuda":
        return None
    if begins:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), available)


def free_on_host() -> float:
    """Bytes of the host, or of its container, that are free; infinite where that can't be read (no Linux)."""
    free = float("inf") if (available := _of_proc("meminfo", "MemAvailable")) is None else available
    with suppress(OSError, ValueError, IndexError):
        limit, current = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        files = re.findall(r"^inactive_file (\d+)$", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
        free = min(free, limit - current + int(files[0]))
    return free


def _of_proc(file: str, key: str) -> int | None:
    """Bytes that a line of a file in /proc has ("VmRSS:   1024 kB")."""
    with suppress(OSError):
        found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc", file).read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else None
    return None


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
