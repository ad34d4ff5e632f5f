"""HostInputs: the inputs of recomputed blocks wait in pinned host memory for the backward pass.

    forward     block 1 | block 2 | block 3         compute
                out 1   | out 2   | out 3           copies, each beside the block that has the input
    backward    block 3 | block 2 | block 1
                in 2    | in 1    |                 copies, one block ahead

A device holds two inputs at a time. Device memory is allocated by torch's allocator on the stream of the computation,
which waits for the end of a copy before it lets go of the memory, so nothing is overwritten too early.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_qlora.activations.device_memory import HostCopies, memory_of
from lightning_qlora.tensors.dtensor import world_size
from lightning_qlora.tensors.values import is_plain
from lightning_qlora.texts import size_text

CHUNK = 2**22  # bytes: an input takes whole chunks, so that memory of a batch fits those of another length
SEGMENT = 2**28  # bytes of one allocation: torch rounds pinned memory up to a power of two
LEAST = 2**20  # bytes of an input that is worth a copy
CHANGED = (
    "a block changed its input in place, so it can't be recomputed from it. Let the block compute out of place, or "
    "pass gradient_checkpointing=False."
)


class HostMemory(HostCopies):
    """Pinned host memory that grows once and is used again, and the copies between it and a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.nbytes = 0
        self._free: list[Tensor] = []

    def take(self, nbytes: int) -> list[Tensor] | None:
        """Chunks for so many bytes; None: the host has no room, half of what is free being left to others."""
        count = math.ceil(nbytes / CHUNK)
        while len(self._free) < count:
            segment = self._new_segment() if self._has_room() else None
            if segment is None:
                return None
            self.nbytes += segment.numel()
            self._free += segment.tensor_split(segment.numel() // CHUNK)
        chunks = self._free[-count:]
        del self._free[-count:]
        return chunks

    def give(self, chunks: list[Tensor]) -> None:
        self._free += chunks

    def copy(self, x: Tensor, chunks: list[Tensor], to_host: bool) -> Any:
        """Start to copy between a tensor and its chunks; the event of the end."""
        pairs = []
        for part, chunk in zip(torch.split(x.view(-1).view(torch.uint8), CHUNK), chunks, strict=True):
            on_host = chunk[: len(part)]
            pairs.append((on_host, part) if to_host else (part, on_host))
        return self.start(pairs)

    def _new_segment(self) -> Tensor | None:
        try:
            return torch.empty(SEGMENT, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError:  # refused
            return None

    def _has_room(self) -> bool:
        memory = memory_of(torch.device("cpu"))
        if memory is None:
            return True
        ranks = min(world_size(), max(torch.cuda.device_count(), 1))
        free = memory.available - memory.used
        return self.nbytes + SEGMENT <= (self.nbytes + free) // 2 // ranks


class PlannedHostMemory(HostMemory):
    """Host memory that is counted: nothing is copied."""

    def __init__(self, device: torch.device, room: float = math.inf) -> None:
        super().__init__(device)
        self._used = 0
        self._room = room  # bytes

    def take(self, nbytes: int) -> list[Tensor] | None:
        count = math.ceil(nbytes / CHUNK)
        if self._used + count * CHUNK > self._room:
            return None
        self._used += count * CHUNK
        self.nbytes = max(self.nbytes, self._used)
        return [torch.empty(0, dtype=torch.uint8, device="meta")] * count

    def give(self, chunks: list[Tensor]) -> None:
        self._used -= len(chunks) * CHUNK

    def copy(self, x: Tensor, chunks: list[Tensor], to_host: bool) -> None:
        pass

    def wait(self, event: Any) -> None:
        pass


class Input:
    """One input of a block: the tensor itself while the block runs, then on the host until it is needed."""

    def __init__(self, x: Tensor, memory: HostMemory, chunks: list[Tensor]) -> None:
        self.source: Tensor | None = x
        self._memory = memory
        self._chunks = chunks
        self._needs_grad = x.requires_grad
        self._version = x._version
        self._shape = x.shape
        self.like = x.new_empty(0)  # of its type and device, and without data in `plan` if x is
        self._value: Tensor | None = None  # on its way to the device, or there
        self._event = memory.copy(x.detach(), chunks, to_host=True)

    def leave(self) -> None:
        """The block ended: let go of the tensor as soon as it is copied."""
        x, self.source = self.source, None
        self._memory.wait(self._event)
        if x is not None and x._version != self._version:
            raise RuntimeError(CHANGED)

    def fetch(self) -> None:
        if self.source is None and self._value is None:
            self._value = self.like.new_empty(self._shape)
            self._event = self._memory.copy(self._value, self._chunks, to_host=False)

    def get(self) -> Tensor:
        if self.source is not None:
            return self.source
        self.fetch()
        self._memory.wait(self._event)
        value, self._value = self._value, None  # the recomputed graph holds it from here on
        assert value is not None
        return value.requires_grad_(self._needs_grad)

    def __del__(self) -> None:
        if self._value is not None:
            self._memory.wait(self._event)
        self._memory.give(self._chunks)


class Call:
    """The forward pass of a block, with inputs that may be on the host: `checkpoint` calls it in both passes."""

    def __init__(self, forward: Callable[..., Any], args: Any, kwargs: Any, before: "weakref.ref[Call] | None") -> None:
        self.forward = forward
        self.args = args
        self.kwargs = kwargs
        self.before = before

    @property
    def inputs(self) -> list[Input]:
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Input)]

    def __call__(self, _: Tensor) -> Any:
        is_again = all(each.source is None for each in self.inputs)
        args = [_value(each) for each in self.args]
        kwargs = {key: _value(each) for key, each in self.kwargs.items()}
        before = self.before() if self.before is not None else None
        if is_again and before is not None:
            for each in before.inputs:
                each.fetch()
        return self.forward(*args, **kwargs)


def _value(value: Any) -> Any:
    return value.get() if isinstance(value, Input) else value


class HostInputs:
    """The inputs of the blocks of one module.

    Attributes:
        memory_on: The memory for a device; None: nothing is copied, as on a CPU, which is the host.
        is_full: Whether the host had no room for an input.
    """

    def __init__(self) -> None:
        self.memory_on: Callable[[torch.device], HostMemory | None] = host_memory
        self.is_full = False
        self.inputs: weakref.WeakSet[Input] = weakref.WeakSet()
        self._memories: dict[torch.device, HostMemory | None] = {}
        self._known: Any = WeakTensorKeyDictionary()  # tensor -> a reference to its Input
        self._last: weakref.ref[Call] | None = None

    def __str__(self) -> str:
        if not any(self._memories.values()):
            return ""
        text = f"inputs of blocks wait on the host ({size_text(self.nbytes, 1024)})"
        return f"{text}; it had no room for more, so the others stay on the device" if self.is_full else text

    def memory(self, device: torch.device) -> HostMemory | None:
        if device not in self._memories:
            self._memories[device] = self.memory_on(device)
        return self._memories[device]

    @property
    def is_here(self) -> bool:
        """Whether blocks ran, and nothing is copied: a CPU is the host."""
        return bool(self._memories) and not any(self._memories.values())

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for memory in self._memories.values() if memory is not None)

    def recomputed(self, recompute: Callable[..., Any], forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The output of a block whose inputs wait on the host; `recompute` lets a function be computed again."""
        named = {key: self._input(value, value) for key, value in kwargs.items() if needs_grad(value)}
        first = next((value for value in args if is_float(value)), None)
        call = Call(forward, [self._input(value, first) for value in args], {**kwargs, **named}, self._last)
        inputs = call.inputs
        if not inputs:
            return recompute(forward, args, kwargs)
        self._last = weakref.ref(call)
        try:
            return recompute(call, [inputs[0].like], {})  # a tensor: `checkpoint` keeps its device's random state
        finally:
            for each in inputs:
                each.leave()

    def _input(self, x: Any, first: Any) -> Any:
        """The input that stands for a tensor; the tensor, if it stays where it is."""
        if not (needs_grad(x) or (is_float(x) and x is first)):
            return x
        if not is_plain(x) and type(x) is not nn.Parameter:  # DTensor, for example, has parts that are tensors
            return x
        if x.nbytes < LEAST or not x.is_contiguous():
            return x
        reference = self._known.get(x)
        if reference is not None and reference() is not None:  # all blocks have it: it is on the device while they run
            return x
        memory = self.memory(x.device)
        chunks = None if memory is None else memory.take(x.nbytes)
        if memory is None or chunks is None:
            self.is_full = self.is_full or memory is not None
            return x
        item = Input(x, memory, chunks)
        self._known[x] = weakref.ref(item)
        self.inputs.add(item)
        return item


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def needs_grad(value: Any) -> bool:
    return is_float(value) and value.requires_grad


def host_memory(device: torch.device) -> HostMemory | None:
    return HostMemory(device) if device.type == "cuda" else None
