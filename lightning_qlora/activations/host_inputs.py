"""HostInputs: the inputs of recomputed blocks wait in pinned host memory for the backward pass.

    forward     block 1 | block 2 | block 3         compute
                out 1   | out 2   | out 3           copies, each beside the block that has the input
    backward    block 3 | block 2 | block 1
                in 2    | in 1    |                 copies, one block ahead

`checkpoint` saves its inputs, so saved-tensor hooks around it get them. Pinned memory is that of torch's allocator.
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_qlora.activations.device_memory import HostCopies, free_on_host
from lightning_qlora.activations.recomputed import recomputed
from lightning_qlora.tensors.dtensor import world_size
from lightning_qlora.tensors.values import is_plain

CHUNK = 2**24  # values of one copy: torch rounds pinned memory up to a power of two
LEAST = 2**20  # bytes of an input that is worth a copy


class HostInputs:
    """The inputs of the blocks of one module. With `is_planned` they are counted and nothing is copied.

    Attributes:
        nbytes: The most bytes that waited at a time.
        room: Bytes of the host for them in a plan.
        is_full: Whether the host had no room for an input.
    """

    def __init__(self, is_planned: bool = False, room: float = math.inf) -> None:
        self.is_planned = is_planned
        self.room = room
        self.used = self.nbytes = 0
        self.is_full = False
        self._copies: dict[torch.device, HostCopies] = {}
        self._last: weakref.ref[_Waiting] | None = None

    def recomputed(self, forward: Any, args: Any, kwargs: Any) -> Any:
        """The output of a block that is recomputed; its first input waits on the host."""
        x = next((value for value in args if isinstance(value, Tensor) and value.is_floating_point()), None)
        if x is None or not self._takes(x):
            return recomputed(forward, args, kwargs)
        version, storage, shape = x._version, x.untyped_storage()._cdata, x.shape  # hooks must not keep x itself
        waiting = _Waiting(self, x, self._last)
        self._last = weakref.ref(waiting)

        def pack(tensor: Tensor) -> Any:
            is_input = tensor.untyped_storage()._cdata == storage and tensor.shape == shape
            return waiting if is_input else tensor

        def unpack(value: Any) -> Tensor:
            return value.get() if isinstance(value, _Waiting) else value

        with saved_tensors_hooks(pack, unpack):
            output = recomputed(forward, args, kwargs)
        waiting.wait()
        if x._version != version:
            raise RuntimeError("A block changed its input in place, so it can't be recomputed from it.")
        return output

    def copies(self, device: torch.device) -> HostCopies:
        return self._copies.setdefault(device, HostCopies(device))

    def can_take(self, x: Tensor) -> bool:
        is_somewhere_else = self.room > 0 if self.is_planned else is_on_card(x)
        return is_somewhere_else and is_plain(x) and x.nbytes >= LEAST and x.is_contiguous()

    def _takes(self, x: Tensor) -> bool:
        if not self.can_take(x):
            return False
        needed = self.used + x.nbytes
        room = self.room
        if not self.is_planned and needed > self.nbytes:
            ranks = min(world_size(), max(torch.cuda.device_count(), 1))
            room = (self.nbytes + free_on_host()) // 2 // ranks
        self.is_full = self.is_full or needed > room
        return needed <= room


def is_on_card(x: Tensor) -> bool:
    return x.is_cuda  # a CPU is the host


class _Waiting:
    """An input on the host; on its way to the device it has a value."""

    def __init__(self, host: HostInputs, x: Tensor, before: "weakref.ref[_Waiting] | None") -> None:
        self._host = host
        self._like = x.new_empty(0)
        self._shape, self._nbytes = x.shape, x.nbytes
        self._before = before
        self._value: Tensor | None = None
        self._chunks: list[Tensor] = []
        self._event: Any = None
        if not host.is_planned:
            values = x.detach().view(-1).split(CHUNK)  # type: ignore[no-untyped-call]
            self._chunks = [torch.empty_like(each, device="cpu", pin_memory=x.is_cuda) for each in values]
            self._event = host.copies(x.device).start(zip(self._chunks, values, strict=True))
        host.used += x.nbytes
        host.nbytes = max(host.nbytes, host.used)

    def wait(self) -> None:
        if self._event is not None:
            self._host.copies(self._like.device).wait(self._event)

    def fetch(self) -> None:
        if self._value is None:
            self._value = self._like.new_empty(self._shape)
            if self._chunks:
                values = self._value.view(-1).split(CHUNK)  # type: ignore[no-untyped-call]
                pairs = zip(values, self._chunks, strict=True)
                self._event = self._host.copies(self._like.device).start(pairs)

    def get(self) -> Tensor:
        self.fetch()
        self.wait()
        value, self._value = self._value, None
        before = self._before() if self._before is not None else None
        if before is not None:
            before.fetch()
        assert value is not None
        return value

    def __del__(self) -> None:
        if self._value is not None:  # fetched, and not used
            self.wait()
        self._host.used -= self._nbytes
