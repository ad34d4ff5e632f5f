"""Reused buffers, so that decoding a weight allocates nothing: one per device, stream, dtype and purpose.

On a CPU a new tensor of 32 MB costs 15 ms of page faults, ten times as much as writing the decoded weight into it.

On a GPU a kernel that overwrites a buffer runs after all kernels that read it, because each stream has its own buffers.
But between two launches of one thread another thread may launch on the same stream. So a buffer belongs to one thread,
or a thread borrows it until all kernels that read it are launched. Decoded weights are large, so their buffer is lent:
autograd runs the backward pass of a GPU in another thread, which borrows the buffer that the forward pass used.

While a CUDA graph is captured, each call gets new memory of the graph: a buffer could be freed before the graph is
replayed, or contain the sums of another graph.
"""

import math
import threading
import weakref
from collections import deque
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.quantization.kept_memory import kept

Place = tuple[torch.device, int, torch.dtype, str]
MAX_VIEWS = 256  # of a buffer that are kept: one for each shape
FREED: Any = deque(maxlen=0)  # keeps nothing


class Buffer(AbstractContextManager["Buffer"]):
    """Uninitialized memory; its first `zeros` elements are zero at first. The end of a context gives it back."""

    matrix: Tensor  # the buffer as it is lent
    transposed: Tensor

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, zeros: int = 0) -> None:
        # A tensor, or a view, made in inference mode cannot be written to outside of it.
        with torch.inference_mode(False):
            self.memory = torch.empty(numel, dtype=dtype, device=device)
            if zeros:
                self.memory[:zeros].zero_()
        self.numel = numel
        self.idle: Any = FREED  # where it is while nobody has it
        # It in some shapes, and transposed. They are kept: to make them takes as long as a small product.
        self.views: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def __exit__(self, *_: object) -> None:
        self.idle.append(self)

    def add_view(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if len(self.views) >= MAX_VIEWS:
            self.views.clear()
        with torch.inference_mode(False), torch.no_grad():
            view = self.memory[: math.prod(shape)].view(shape)
            views = self.views[shape] = view, view.movedim(0, -1)
        return views


class _Buffers(dict[Place, Buffer]):
    """The buffers of one thread. A subclass, because a plain dict has no weak references."""


class _ThreadLocal(threading.local):
    def __init__(self) -> None:
        self.buffers = _Buffers()
        _all_threads[id(self.buffers)] = self.buffers


_all_threads: weakref.WeakValueDictionary[int, _Buffers] = weakref.WeakValueDictionary()
_thread = _ThreadLocal()
_idle: dict[Place, list[Buffer]] = {}  # buffers that can be lent


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, purpose: str, zeros: int = 0) -> Tensor:
    """A tensor; the next call of this thread with the same purpose reuses its memory."""
    stream = 0
    if device.type == "cuda":
        stream = _stream(device)
    numel = math.prod(shape)
    buffers = _thread.buffers
    place = device, stream, dtype, purpose
    buffer = buffers.get(place)
    if stream == CAPTURED:
        buffer = Buffer(numel, dtype, device, zeros)
    elif buffer is None or buffer.numel < numel:
        buffer = buffers[place] = kept(lambda: Buffer(numel, dtype, device, zeros), device)
    view, _ = buffer.views.get(shape) or buffer.add_view(shape)
    return view


def lend(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Buffer:
    """A buffer for a decoded weight, to be used in a `with` statement.

    There is one, and one more for each thread that has one at the same time, until threads end.
    """
    stream = 0
    if device.type == "cuda":
        stream = _stream(device)
    numel = math.prod(shape)
    idle = _idle.setdefault((device, stream, dtype, "weight"), [])
    if len(idle) > 1:
        del idle[: -threading.active_count()]  # those of threads that ended
    buffer: Buffer | None
    try:  # to ask whether there is one would not do: another thread may come between
        buffer = idle.pop()
    except IndexError:
        buffer = None
    if stream == CAPTURED:
        buffer = Buffer(numel, dtype, device)
    elif buffer is None or buffer.numel < numel:
        buffer = None  # freed before the larger one is allocated
        buffer = kept(lambda: Buffer(numel, dtype, device), device)
        buffer.idle = idle
    buffer.matrix, buffer.transposed = buffer.views.get(shape) or buffer.add_view(shape)
    return buffer


CAPTURED = -1


def _stream(device: torch.device) -> int:
    """The stream of a GPU on which this thread launches; CAPTURED while a graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        return CAPTURED
    return int(torch._C._cuda_getCurrentRawStream(device.index))  # `current_stream` makes an object each time


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def release() -> None:
    """Free the buffers of all threads (autograd's threads never end)."""
    for idle in [*_idle.values()]:
        idle.clear()
    for buffers in [*_all_threads.values()]:
        buffers.clear()
