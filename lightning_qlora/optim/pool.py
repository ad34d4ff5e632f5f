"""Pool: the host memory that holds the optimizer state of one device between steps.

Adapters have hundreds of small state tensors, so tensors share allocations (`Segment`). The storage of each tensor is
only its part of the segment, so `torch.save` writes the tensor and not the segment.
"""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

SEGMENT_BYTES = 32 * 2**20
ALIGNMENT = 512  # bytes, as in torch's CUDA allocator
MIB = 2**20


class Segment:
    """One allocation of a pool, filled from the front and freed with the last tensor in it."""

    def __init__(self, pool: "Pool", nbytes: int) -> None:
        self.address = pool._allocate(nbytes)
        self.nbytes = nbytes
        self.used = 0
        # Not at interpreter exit: tensors may still be alive then, and the driver frees everything anyway.
        weakref.finalize(self, pool._free, self.address).atexit = False

    def tensor(self, nbytes: int, device: torch.device) -> Tensor:
        """A uint8 tensor [nbytes] over the next free bytes; it keeps the segment alive."""
        address = self.address + self.used
        self.used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        # NumPy's and CUDA's array interface; torch keeps `span`, and so the segment, as long as a tensor uses it.
        interface = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        span: Any = SimpleNamespace(segment=self, __array_interface__=interface, __cuda_array_interface__=interface)
        if device.type == "cpu":
            span = np.asarray(span)
        tensor = torch.as_tensor(span, device=device)
        if tensor.data_ptr() != address:
            raise RuntimeError(f"torch copied memory of {device} instead of sharing it.")
        return tensor


class Pool(ABC):
    """Host memory for the optimizer state of one device. Methods take plain, dense tensors and keep their values."""

    kind: Literal["managed", "pinned"]  # CUDA unified memory, or page-locked host memory and explicit copies

    def __init__(self, memory_device: torch.device, reason: str = "") -> None:
        self.reason = reason  # why the pool is not "managed"
        self._memory_device = memory_device  # of tensors over the pool's memory
        self._segments: weakref.WeakSet[Segment] = weakref.WeakSet()

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self._segments)

    @abstractmethod
    def move_in(self, tensor: Tensor) -> None:
        """Move the memory of `tensor` into the pool; it stays the same Python object."""

    @torch.no_grad()
    def new_tensor(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A new tensor in the pool with these values, which may be on any device."""
        return self._empty_like(values, dtype).copy_(values)

    @abstractmethod
    def owns(self, tensor: Tensor) -> bool:
        """Whether `tensor` is in the pool."""

    @abstractmethod
    def prefetch(self, tensors: Iterable[Tensor]) -> None:
        """Start to move those tensors that are in the pool to the device, before the kernels that use them."""

    # Unified memory needs none of these three: the driver moves the pages.

    def wait_prefetch(self) -> None:  # noqa: B027
        """Make kernels that are launched from now on wait for the last prefetch."""

    def evict(self, tensors: Iterable[Tensor]) -> None:  # noqa: B027
        """Start to move those tensors that are in the pool to the host; later kernels can use their device memory."""

    def synchronize(self) -> None:  # noqa: B027
        """Make the CPU wait until it can read evicted tensors."""

    def move_out(self, tensor: Tensor) -> None:
        """Move the memory of `tensor` from the pool to plain host memory; it stays the same Python object."""
        self.synchronize()
        tensor.data = tensor.detach().to("cpu", copy=True)

    @abstractmethod
    def _allocate(self, nbytes: int) -> int:
        """The address of `nbytes` new bytes; raise MemoryError if they are refused."""

    @abstractmethod
    def _free(self, address: int) -> None:
        """Free what `_allocate` returned, when the device no longer uses it."""

    def _segment_bytes(self, nbytes: int) -> int:
        return max(nbytes, SEGMENT_BYTES)

    def _segment_for(self, nbytes: int) -> Segment:
        for segment in self._segments:
            if segment.nbytes - segment.used >= nbytes:
                return segment
        size = self._segment_bytes(nbytes)
        try:
            segment = Segment(self, size)
        except MemoryError as error:
            raise MemoryError(
                f"Paging optimizer state: {size / MIB:,.1f} MiB of {self.kind} memory were requested and refused; "
                f"{self.nbytes / MIB:,.1f} MiB are allocated already. Paged state is in host memory: free host memory, "
                "or make the state smaller with an 8-bit optimizer (torchao.optim.AdamW8bit) or a lower rank `r`. "
                "To train without paging, pass paged_optimizer=False (or remove the PagedOptimizer callback). "
                "Training can continue from the last checkpoint with fit(..., ckpt_path=...)."
            ) from error
        self._segments.add(segment)
        return segment

    def _empty_like(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """New memory with the shape of `values`, and with its strides if it is dense."""
        nbytes = values.numel() * dtype.itemsize
        memory = self._segment_for(nbytes).tensor(nbytes, self._memory_device).view(dtype)
        strides = torch.empty_like(values, device="meta").stride()
        # Detached, or autograd would keep the memory alive as the base of a view, also after `move_out`.
        return memory.as_strided(values.shape, strides).detach()
