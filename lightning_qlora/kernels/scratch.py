"""Reused buffers, so that decoding a weight allocates nothing: one per thread, device, stream, dtype and purpose.

On a CPU a new tensor of 32 MB costs 15 ms of page faults, ten times as much as writing the decoded weight into it.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

Place = tuple[torch.device, int, torch.dtype, str]
MAX_MATRICES = 256  # views that a thread keeps: one for each shape


class _Buffers(dict[Place, Tensor]):
    """The buffers of one thread. A subclass, because a plain dict has no weak references."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}  # views of them

    def clear(self) -> None:
        super().clear()
        self.matrices.clear()


class _ThreadLocal(threading.local):
    """Autograd runs the backward pass of a GPU in a thread of its own, which has its own buffers."""

    def __init__(self) -> None:
        self.buffers = _Buffers()
        _all_threads[id(self.buffers)] = self.buffers


_all_threads: weakref.WeakValueDictionary[int, _Buffers] = weakref.WeakValueDictionary()
_thread = _ThreadLocal()


def scratch(numel: int, dtype: torch.dtype, device: torch.device, purpose: str = "weight", zeros: int = 0) -> Tensor:
    """A flat tensor of `numel` elements; the next call with the same dtype, device and purpose reuses its memory.

    On a GPU this is safe because each stream has its own buffer: a kernel that overwrites the buffer runs after all
    kernels that read it. The buffer is uninitialized; its first `zeros` elements are zero when it is allocated.

    While a CUDA graph is captured, each call returns a new tensor from its memory: a buffer could be freed before the
    graph is replayed, or contain the sums of another graph.
    """
    if is_capturing(device):
        return _new(numel, dtype, device, zeros)
    stream = 0
    if device.type == "cuda":  # as Triton reads it: `torch.cuda.current_stream` makes an object each time
        stream = int(torch._C._cuda_getCurrentRawStream(device.index))
    place = device, stream, dtype, purpose
    buffers = _thread.buffers
    buffer = buffers.get(place)
    if buffer is None or buffer.numel() < numel:
        buffers.matrices.clear()  # they would keep the memory of the smaller buffer
        # A tensor created in inference mode cannot be written to outside of it.
        with torch.inference_mode(False):
            buffer = buffers[place] = _new(numel, dtype, device, zeros)
    return buffer if buffer.numel() == numel else buffer[:numel]


def _new(numel: int, dtype: torch.dtype, device: torch.device, zeros: int) -> Tensor:
    buffer = torch.empty(numel, dtype=dtype, device=device)
    if zeros:
        buffer[:zeros].zero_()
    return buffer


def scratch_matrix(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, purpose: str = "weight"
) -> tuple[Tensor, Tensor]:
    """The buffer as a matrix, and transposed. The views are kept: to make them takes as long as a small product."""
    is_cuda = device.type == "cuda"
    stream = int(torch._C._cuda_getCurrentRawStream(device.index)) if is_cuda else 0
    place = device, stream, dtype, purpose, shape
    matrices = _thread.buffers.matrices
    views = matrices.get(place)
    if views is None or (is_cuda and torch.cuda.is_current_stream_capturing()):
        # As in `scratch`: a view made in inference mode cannot be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            matrix = scratch(shape[0] * shape[1], dtype, device, purpose).view(shape)
            views = matrix, matrix.T
        if not is_capturing(device):
            if len(matrices) >= MAX_MATRICES:
                matrices.clear()
            matrices[place] = views
    return views


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def release() -> None:
    """Free the buffers of all threads (autograd's threads never end)."""
    for buffers in [*_all_threads.values()]:
        buffers.clear()
