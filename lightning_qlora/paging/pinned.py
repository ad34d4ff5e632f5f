"""PinnedPool: the same face where unified memory cannot page (WSL, Windows, some virtual machines, ROCm).

State rests in page-locked host memory. Before a step it is copied to the device, after the step it is copied back, both
on a stream of their own, so that a copy runs while other state is being computed with.
"""

from collections.abc import Iterable
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lightning_qlora.paging.pool import refusal


class Transfers(Protocol):
    """The calls a pinned pool makes. `cuda.CudaTransfers` has the real ones."""

    def host_empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Page-locked host memory of the shape and strides of `like`; MemoryError if there is none."""

    def device_empty(self, like: Tensor) -> Tensor:
        """Device memory of the shape, strides and type of `like`."""

    def fetch(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Start copying (device memory, its home): after the kernels started so far, beside those started later."""

    def arrive(self) -> None:
        """Let kernels started from here on wait for the last `fetch`."""

    def store(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Start copying (home, device memory) after the kernels started so far."""

    def synchronize(self) -> None:
        """Wait for all copies."""


class PinnedPool:
    """A `Pool` of pinned host memory: its tensors are host tensors between steps and device tensors within one."""

    kind: Final = "pinned"

    def __init__(self, transfers: Transfers, reason: str) -> None:
        self.reason = reason
        self._transfers = transfers
        self._homes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> its pinned memory

    @property
    def nbytes(self) -> int:
        """Bytes of pinned memory held now."""
        return sum(home.numel() * home.element_size() for home in self._homes.values())  # type: ignore[no-untyped-call]

    def adopt(self, tensor: Tensor) -> None:
        """Give the tensor a home in pinned memory; its values go there with the next `to_host`."""
        self._homes[tensor] = self._home(tensor, tensor.dtype)

    @torch.no_grad()
    def place(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A new tensor at home in pinned memory with these values."""
        home = self._home(values, dtype).copy_(values)
        tensor = home.detach()
        self._homes[tensor] = home
        return tensor

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor has a home here."""
        return tensor in self._homes

    def to_device(self, tensors: Iterable[Tensor]) -> None:
        """Start copying tensors that are at home to the device."""
        pairs = []
        for tensor in tensors:
            home = self._homes[tensor]
            if _at_home(tensor, home):
                tensor.data = self._transfers.device_empty(home)
                pairs.append((tensor.detach(), home))
        self._transfers.fetch(pairs)

    def arrive(self) -> None:
        """Let kernels wait for the copies `to_device` started."""
        self._transfers.arrive()

    def to_host(self, tensors: Iterable[Tensor]) -> None:
        """Start copying tensors that are on the device home, and give the device memory back."""
        pairs = []
        for tensor in tensors:
            home = self._homes[tensor]
            if not _at_home(tensor, home):
                pairs.append((home, tensor.detach()))
                tensor.data = home
        self._transfers.store(pairs)

    def finish(self) -> None:
        """Wait for the copies: the CPU may read what is at home."""
        self._transfers.synchronize()

    @torch.no_grad()
    def release(self, tensor: Tensor) -> None:
        """Move the tensor to plain host memory, in place."""
        self._transfers.synchronize()
        plain = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        tensor.data = plain.copy_(tensor.detach())
        del self._homes[tensor]

    def _home(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        try:
            return self._transfers.host_empty(like, dtype)
        except MemoryError as error:
            raise refusal(like.numel() * dtype.itemsize, self.nbytes, self.kind) from error


def _at_home(tensor: Tensor, home: Tensor) -> bool:
    return tensor.data_ptr() == home.data_ptr()
