"""PinnedPool: optimizer state in page-locked host memory, where unified memory cannot page.

That is under Windows and WSL, in some virtual machines, and on ROCm. The state is copied to the device before a step
and back after it, on a separate stream, so that copies run beside kernels. The CPU waits for a copy only when it reads
the state.

Device memory is allocated and freed in the order of the current stream, as torch does everywhere: a copy to the host
makes this stream wait, so that the next forward pass can use the memory. `record_stream` would block the memory until
the CPU sees the end of the copy, and the CPU launches kernels up to a step ahead.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_qlora.optim.paging.pool import SEGMENT_BYTES, Pool


class PinnedPool(Pool):
    """A `Pool` of page-locked memory. Its tensors are CPU tensors between steps and CUDA tensors in a step."""

    kind = "pinned"

    def __init__(self, device: torch.device, reason: str) -> None:
        super().__init__(torch.device("cpu"), reason)
        self._device = device
        self._pinned: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> its page-locked memory, a CPU tensor
        self._blocks: dict[int, Tensor] = {}
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._to_device: torch.cuda.Event | None = None  # the end of the last copy to the device
        self._to_host: torch.cuda.Event | None = None  # the end of the last copy to the host, until the CPU has waited

    @override
    def move_in(self, tensor: Tensor) -> None:
        """Allocate page-locked memory for the tensor; the next `evict` copies its values there."""
        self._pinned[tensor] = self._empty_like(tensor.detach(), tensor.dtype)

    @override
    def new_tensor(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        pinned = super().new_tensor(values, dtype)
        tensor = pinned.detach()
        self._pinned[tensor] = pinned
        return tensor

    @override
    def owns(self, tensor: Tensor) -> bool:
        return tensor in self._pinned

    @override
    def prefetch(self, tensors: Iterable[Tensor]) -> None:
        moving = self._pairs(tensors, on_host=True)
        for tensor, pinned in moving:
            tensor.data = torch.empty_like(pinned, device=self._device)
        if moving:
            self._copy_to_device([(tensor.detach(), pinned) for tensor, pinned in moving])

    @override
    def wait_prefetch(self) -> None:
        if self._to_device is not None:
            torch.cuda.current_stream(self._device).wait_event(self._to_device)

    @override
    def evict(self, tensors: Iterable[Tensor]) -> None:
        moving = self._pairs(tensors, on_host=False)
        if moving:
            self._copy_to_host([(pinned, tensor.detach()) for tensor, pinned in moving])
        for tensor, pinned in moving:
            tensor.data = pinned

    @override
    def synchronize(self) -> None:
        if self._to_host is not None:
            self._to_host.synchronize()
            self._to_host = None

    @override
    def move_out(self, tensor: Tensor) -> None:
        super().move_out(tensor)
        del self._pinned[tensor]

    @override
    def _segment_bytes(self, nbytes: int) -> int:
        """A power of two: torch's pinned allocator rounds up to one, and other tensors can use what is left."""
        return max(1 << (nbytes - 1).bit_length(), SEGMENT_BYTES)

    @override
    def _allocate(self, nbytes: int) -> int:
        try:
            block = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise MemoryError(str(error)) from error
        self._blocks[block.data_ptr()] = block
        return block.data_ptr()

    @override
    def _free(self, address: int) -> None:
        # torch may reuse the memory at once, while a copy from it still runs: ours, or Lightning's when it resumes.
        torch.cuda.synchronize(self._device)
        del self._blocks[address]

    def _pairs(self, tensors: Iterable[Tensor], on_host: bool) -> list[tuple[Tensor, Tensor]]:
        """Those tensors of the pool that are in their page-locked memory or on the device, with that memory."""
        pairs = [(tensor, self._pinned[tensor]) for tensor in tensors if tensor in self._pinned]
        return [pair for pair in pairs if (pair[0].data_ptr() == pair[1].data_ptr()) is on_host]

    def _copy_to_device(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._to_device = self._copy(pairs)

    def _copy_to_host(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._to_host = self._copy(pairs)
        torch.cuda.current_stream(self._device).wait_event(self._to_host)

    @torch.no_grad()
    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> torch.cuda.Event:
        """Start to copy (target, source) and return the end of it."""
        # Kernels launched before may still write the source, or read the memory that torch now uses for the target.
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        end: torch.cuda.Event = self._copies.record_event()
        return end
