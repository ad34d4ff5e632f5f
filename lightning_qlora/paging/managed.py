"""ManagedPool: optimizer state in CUDA unified memory.

Unified memory has one address for the CPU and the GPU; its pages move between the two. We ask the driver to prefer
the host and fetch the pages ahead of each optimizer step. When forward and backward need the device memory, the driver
evicts the pages to the host by itself: this is how the QLoRA paper (section 3, "Paged Optimizers") avoids running out
of memory on long sequences.

Tensors are laid over the memory through `__cuda_array_interface__` and not through `torch.cuda.MemPool`: a MemPool's
bytes count against `set_per_process_memory_fraction` as if they were device memory, it refuses to work under
`expandable_segments:True`, and it frees nothing before `empty_cache()`. Here a block is freed with its last tensor.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

import torch
from torch import Tensor

from lightning_qlora.paging.pool import refusal

SEGMENT_BYTES = 32 * 2**20  # Adapters have hundreds of small state tensors; this many bytes share one allocation.
ALIGNMENT = 512  # bytes, as torch's own CUDA allocator gives


class UnifiedMemory(Protocol):
    """The calls a managed pool makes. `cuda.CudaUnifiedMemory` has the real ones."""

    def allocate(self, nbytes: int) -> int:
        """The address of new memory that prefers to live on the host; MemoryError if there is none."""

    def free(self, address: int) -> None:
        """Free what `allocate` gave, once the device no longer uses it."""

    def prefetch(self, address: int, nbytes: int) -> None:
        """Move a range to the device, in order with the kernels of the current stream."""

    def tensor(self, address: int, nbytes: int, owner: object) -> Tensor:
        """A uint8 tensor [nbytes] over the memory at `address`; it keeps `owner` alive."""


class Segment:
    """One allocation, filled from the front. It is freed when the last tensor in it is gone."""

    def __init__(self, memory: UnifiedMemory, nbytes: int) -> None:
        self.address = memory.allocate(nbytes)
        self.nbytes = nbytes
        self.used = 0
        # Not at interpreter exit: tensors may still be alive then, and the driver frees everything anyway.
        weakref.finalize(self, memory.free, self.address).atexit = False

    @property
    def room(self) -> int:
        """Bytes not taken yet."""
        return self.nbytes - self.used

    def take(self, nbytes: int) -> int:
        """The address of the next free range, of at most `room` bytes."""
        address = self.address + self.used
        self.used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return address


class ManagedPool:
    """A `Pool` of CUDA unified memory: its tensors are device tensors at all times."""

    kind: Final = "managed"
    reason = ""

    def __init__(self, memory: UnifiedMemory) -> None:
        self._memory = memory
        self._segments: weakref.WeakSet[Segment] = weakref.WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""
        return sum(segment.nbytes for segment in self._segments)

    def adopt(self, tensor: Tensor) -> None:
        """Move the memory under `tensor` into the pool, in place."""
        tensor.data = self.place(tensor.detach(), tensor.dtype)

    @torch.no_grad()
    def place(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A new managed tensor with these values."""
        nbytes = values.numel() * dtype.itemsize
        segment = self._segment_with_room(nbytes)
        memory = self._memory.tensor(segment.take(nbytes), nbytes, owner=segment).view(dtype)
        # Detached, or autograd would keep the memory alive as the base of a view, even after `release`.
        return memory.as_strided(values.shape, values.stride()).copy_(values).detach()

    def owns(self, tensor: Tensor) -> bool:
        """Whether the memory of `tensor` belongs to the pool."""
        address = tensor.data_ptr()
        return any(s.address <= address < s.address + s.nbytes for s in self._segments)

    def to_device(self, tensors: Iterable[Tensor]) -> None:
        """Prefetch the pages of these tensors; neighbours go in one call."""
        for address, nbytes in _merged((t.data_ptr(), t.numel() * t.element_size()) for t in tensors):
            self._memory.prefetch(address, nbytes)

    def arrive(self) -> None:
        """Nothing: prefetches are in order with the kernels, and a page that is still away is fetched when touched."""

    def to_host(self, tensors: Iterable[Tensor]) -> None:
        """Nothing: the driver evicts pages when, and only when, the device memory is needed."""

    def finish(self) -> None:
        """Nothing: a managed tensor is read through the stream, like any device tensor."""

    @torch.no_grad()
    def release(self, tensor: Tensor) -> None:
        """Move the memory under `tensor` to plain host memory, in place."""
        plain = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        tensor.data = plain.copy_(tensor.detach())

    def _segment_with_room(self, nbytes: int) -> Segment:
        for segment in self._segments:
            if segment.room >= nbytes:
                return segment
        wanted = max(nbytes, SEGMENT_BYTES)
        try:
            segment = Segment(self._memory, wanted)
        except MemoryError as error:
            raise refusal(wanted, self.nbytes, self.kind) from error
        self._segments.add(segment)
        return segment


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join (address, bytes) ranges that follow each other."""
    joined: list[tuple[int, int]] = []
    for address, nbytes in sorted(ranges):
        if joined and address - sum(joined[-1]) < ALIGNMENT:
            joined[-1] = (joined[-1][0], address + nbytes - joined[-1][0])
        else:
            joined.append((address, nbytes))
    yield from joined
