"""The face of a pool: host memory in which the optimizer state of one device lives between steps."""

from collections.abc import Iterable
from typing import Literal, Protocol

import torch
from torch import Tensor


class Pool(Protocol):
    """Memory that optimizer state is paged to. Every method takes plain dense tensors and keeps their values.

    Attributes:
        reason: Why it is no "managed" pool; empty if it is.
    """

    reason: str

    @property
    def kind(self) -> Literal["managed", "pinned"]:
        """CUDA unified memory, or page-locked host memory with explicit copies."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated now."""

    def adopt(self, tensor: Tensor) -> None:
        """Move the memory under `tensor` into the pool; the tensor stays the same object with the same values."""

    def place(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """A new tensor in the pool with these values, which may come from any device."""

    def owns(self, tensor: Tensor) -> bool:
        """Whether the memory of `tensor` belongs to the pool."""

    def to_device(self, tensors: Iterable[Tensor]) -> None:
        """Start moving tensors to the device, ahead of the kernels that will use them."""

    def arrive(self) -> None:
        """Let kernels started from here on wait for what `to_device` started so far."""

    def to_host(self, tensors: Iterable[Tensor]) -> None:
        """Give the device memory of these tensors back, or let the driver take it when it needs it."""

    def finish(self) -> None:
        """Wait until what `to_host` started may be read by the CPU."""

    def release(self, tensor: Tensor) -> None:
        """Move the memory under `tensor` out of the pool to plain host memory, in place."""


def refusal(nbytes: int, held: int, kind: str) -> MemoryError:
    """The error for an allocation that was refused."""
    mib = 2**20
    return MemoryError(
        f"Paging optimizer state: {nbytes / mib:,.1f} MiB of {kind} memory were asked for and refused; "
        f"{held / mib:,.1f} MiB are held already. Paged state lives in host memory, so free some there, or make the "
        "state smaller: PagedAdamW8bit needs a quarter of AdamW's, a lower rank `r` proportionally less. "
        "To train without paging pass paged_optimizer=False (or drop the PagedOptimizer callback). "
        "Nothing is lost: training goes on from the last checkpoint with fit(..., ckpt_path=...)."
    )
