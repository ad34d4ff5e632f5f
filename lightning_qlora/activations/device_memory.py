"""What a process has of a device: bytes in use, at the peak, and available; and copies to page-locked host memory."""

import gc
import math
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
        status = _of_proc("self/status")
        if not status:
            return None
        return Memory(status["VmRSS"], status["VmHWM"], int(status["VmRSS"] + free_on_host()))
    if device.type != "cuda":
        return None
    if begins:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), available)


def free_on_host() -> float:
    """Bytes of the host, or of its container, that are free; infinite where that can't be read (no Linux)."""
    free: float = _of_proc("meminfo").get("MemAvailable", math.inf)
    with suppress(OSError, ValueError, IndexError):
        limit, current = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        files = re.findall(r"^inactive_file (\d+)$", Path("/sys/fs/cgroup/memory.stat").read_text(), re.MULTILINE)
        free = min(free, limit - current + int(files[0]))
    return free


def _of_proc(file: str) -> dict[str, int]:
    """Bytes of each line of a file in /proc ("VmRSS:   1024 kB"); none where there is no such file."""
    with suppress(OSError):
        lines = re.findall(r"^(\w+):\s+(\d+) kB$", Path("/proc", file).read_text(), re.MULTILINE)
        return {name: 1024 * int(number) for name, number in lines}
    return {}


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
