"""Reused buffers, so that decoding a weight allocates nothing: one per device, stream, dtype and purpose.

On a CPU a new tensor of 32 MB costs 15 ms of page faults, ten times as much as writing the decoded weight into it.

On a GPU a kernel that overwrites a buffer runs after all kernels that read it, because each stream has its own buffers.
But between two launches of one thread another thread may launch on the same stream. So a buffer belongs to one thread,
or a thread borrows it until all kernels that read it are launched. Decoded weights are large, so their buffer is lent:
autograd runs the backward pass of a GPU in another thread, which borrows the buffer that the forward pass used.

While a CUDA graph is captured, each call gets new memory of the graph: a buffer could be freed before the graph is
replayed, or contain the sums of another graph.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.quantization.kept_memory import kept

Place = tuple[torch.device, int, torch.dtype, str]
MAX_MATRICES = 256  # views of a buffer that are kept: one for each shape


class Buffer:
    """Uninitialized memory; its first `zeros` elements are zero at first. `with` is for a buffer that is lent."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, zeros: int = 0) -> None:
        # A tensor, or a view, made in inference mode cannot be written to outside of it.
        with torch.inference_mode(False):
            self.memory = torch.empty(numel, dtype=dtype, device=device)
            if zeros:
                self.memory[:zeros].zero_()
        self.numel = numel
        self.matrices: Any = None  # the buffer as a matrix, and transposed, as it is lent
        self.idle: list[Buffer] | None = None  # where it goes when it is given back
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def views(self, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The buffer as a matrix, and transposed. They are kept: to make them takes as long as a small product."""
        views = self._views.get(shape)
        if views is None:
            if len(self._views) >= MAX_MATRICES:
                self._views.clear()
            with torch.inference_mode(False), torch.no_grad():
                matrix = self.memory[: shape[0] * shape[1]].view(shape)
                views = self._views[shape] = matrix, matrix.T
        return views

    def __enter__(self) -> Any:
        return self.matrices

    def __exit__(self, *_: object) -> None:
        if self.idle is not None:
            self.idle.append(self)
            if len(self.idle) > 1:
                del self.idle[: -threading.active_count()]  # those of threads that ended


class _Buffers(dict[Place, Buffer]):
    """The buffers of one thread. A subclass, because a plain dict has no weak references."""


class _ThreadLocal(threading.local):
    def __init__(self) -> None:
        self.buffers = _Buffers()
        _all_threads[id(self.buffers)] = self.buffers


_all_threads: weakref.WeakValueDictionary[int, _Buffers] = weakref.WeakValueDictionary()
_thread = _ThreadLocal()
_idle: dict[Place, list[Buffer]] = {}  # buffers that can be lent


def scratch(numel: int, dtype: torch.dtype, device: torch.device, purpose: str, zeros: int = 0) -> Tensor:
    """A flat tensor of `numel` elements; the next call of this thread with the same purpose reuses its memory."""
    buffer = _own_buffer(numel, dtype, device, purpose, zeros)
    return buffer.memory if buffer.numel == numel else buffer.memory[:numel]


def scratch_matrix(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, purpose: str
) -> tuple[Tensor, Tensor]:
    """The same as a matrix, and transposed."""
    return _own_buffer(shape[0] * shape[1], dtype, device, purpose).views(shape)


def _own_buffer(numel: int, dtype: torch.dtype, device: torch.device, purpose: str, zeros: int = 0) -> Buffer:
    place = _place(device, dtype, purpose)
    if place is None:
        return Buffer(numel, dtype, device, zeros)
    buffers = _thread.buffers
    buffer = buffers.get(place)
    if buffer is None or buffer.numel < numel:
        buffer = buffers[place] = kept(lambda: Buffer(numel, dtype, device, zeros), device)
    return buffer


def lend(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Buffer:
    """A buffer for a decoded weight: `with` gives its matrices, and takes it back.

    There is one, and one more for each thread that has one at the same time, until threads end.
    """
    numel = shape[0] * shape[1]
    place = _place(device, dtype, "weight")
    if place is None:
        buffer = Buffer(numel, dtype, device)
    else:
        buffer = _lent(_idle.setdefault(place, []), numel, dtype, device)
    buffer.matrices = buffer.views(shape)
    return buffer


def _lent(idle: list[Buffer], numel: int, dtype: torch.dtype, device: torch.device) -> Buffer:
    buffer: Buffer | None
    try:  # to ask whether there is one would not do: another thread may come between
        buffer = idle.pop()
    except IndexError:
        buffer = None
    if buffer is None or buffer.numel < numel:
        buffer = None  # freed before the larger one is allocated
        buffer = kept(lambda: Buffer(numel, dtype, device), device)
        buffer.idle = idle
    return buffer


def _place(device: torch.device, dtype: torch.dtype, purpose: str) -> Place | None:
    """None while a graph is captured."""
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = int(torch._C._cuda_getCurrentRawStream(device.index))  # `current_stream` makes an object each time
    return device, stream, dtype, purpose


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def release() -> None:
    """Free the buffers of all threads (autograd's threads never end)."""
    for idle in [*_idle.values()]:
        idle.clear()
    for buffers in [*_all_threads.values()]:
        buffers.clear()
