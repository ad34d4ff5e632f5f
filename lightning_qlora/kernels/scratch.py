"""Reused buffers, so that decoding a weight allocates nothing: one per thread, device, stream, dtype and purpose.

On a CPU a new tensor of 32 MB costs 15 ms of page faults, ten times as much as writing the decoded weight into it.
"""

import threading
import weakref

import torch
from torch import Tensor


class _Buffers(dict[tuple[torch.device, int, torch.dtype, str], Tensor]):
    """The buffers of one thread. A subclass, because a plain dict has no weak references."""


class _ThreadLocal(threading.local):
    """Autograd runs the backward pass of a GPU in a thread of its own, which has its own buffers."""

    def __init__(self) -> None:
        self.buffers = _Buffers()
        _all_threads[id(self.buffers)] = self.buffers


_all_threads: weakref.WeakValueDictionary[int, _Buffers] = weakref.WeakValueDictionary()
_thread = _ThreadLocal()


def scratch(
    numel: int, dtype: torch.dtype, device: torch.device, purpose: str = "weight", zero: bool = False
) -> Tensor:
    """A flat tensor of `numel` elements; the next call with the same dtype, device and purpose reuses its memory.

    On a GPU this is safe because each stream has its own buffer: a kernel that overwrites the buffer runs after all
    kernels that read it. The buffer is uninitialized, or with `zero` set to zero when it is allocated.

    While a CUDA graph is captured, each call returns a new tensor from its memory: a buffer could be freed before the
    graph is replayed, or contain the sums of another graph.
    """
    make = torch.zeros if zero else torch.empty
    if is_capturing(device):
        return make(numel, dtype=dtype, device=device)
    stream = 0
    if device.type == "cuda":  # as Triton reads it: `torch.cuda.current_stream` makes an object each time
        stream = int(torch._C._cuda_getCurrentRawStream(device.index))
    key = (device, stream, dtype, purpose)
    buffer = _thread.buffers.get(key)
    if buffer is None or buffer.numel() < numel:
        # A tensor created in inference mode cannot be written to outside of it.
        with torch.inference_mode(False):
            buffer = _thread.buffers[key] = make(numel, dtype=dtype, device=device)
    return buffer if buffer.numel() == numel else buffer[:numel]


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def release() -> None:
    """Free the buffers of all threads (autograd's threads never end)."""
    for buffers in [*_all_threads.values()]:
        buffers.clear()
