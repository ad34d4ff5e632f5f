"""The two kinds of host memory for optimizer state: ManagedPool, and PinnedPool where that cannot page.

**Unified ("managed") memory** has the same address on the CPU and on the GPU, and its pages move between them. The
driver is told to prefer the host, the pages are prefetched before each optimizer step, and the driver evicts them when
forward and backward need GPU memory (QLoRA paper, section 3, "Paged Optimizers").

Why not `torch.cuda.MemPool`: its bytes count against `set_per_process_memory_fraction` as device memory, it does not
work with `expandable_segments:True`, and it frees nothing before `empty_cache()`. Here `__cuda_array_interface__` gives
torch tensors over the memory.

cuda-bindings is imported when the first pool is opened. Versions 12 and 13 both work: from 13 on `cudaMemAdvise` and
`cudaMemPrefetchAsync` take a location in place of a device number; in 12 these forms have the suffix `_v2`.

**Page-locked ("pinned") memory** is for Windows and WSL, some virtual machines, and ROCm. The state is copied to the
device before a step and back after it, on a separate stream, so that copies run beside kernels. The CPU waits for a
copy only when it reads the state.

Device memory is allocated and freed in the order of the current stream, as torch does everywhere: a copy to the host
makes this stream wait, so that the next forward pass can use the memory. `record_stream` would block the memory until
the CPU sees the end of the copy, and the CPU launches kernels up to a step ahead.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from lightning_qlora.activations.device_memory import HostCopies
from lightning_qlora.checks import install
from lightning_qlora.optim.pool import ALIGNMENT, SEGMENT_BYTES, Pool


class ManagedPool(Pool):
    """A `Pool` of CUDA unified memory. Its tensors are CUDA tensors at all times.

    Prefetches are in order with the kernels, and torch synchronizes when it copies a tensor to the CPU.
    """

    kind = "managed"

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cuda", _index(device)))
        runtime = _runtime()
        self._runtime = runtime
        self._advise = getattr(runtime, "cudaMemAdvise_v2", runtime.cudaMemAdvise)
        self._prefetch_async = getattr(runtime, "cudaMemPrefetchAsync_v2", runtime.cudaMemPrefetchAsync)

    def refusal(self) -> str | None:
        """What the driver refuses of one page, or None: advice fails on some systems whose attributes promise it."""
        try:
            address = self._allocate(ALIGNMENT)
            self._prefetch_range(address, ALIGNMENT)
            self._free(address)
        except (MemoryError, RuntimeError) as error:
            return str(error).rstrip(".")
        return None

    @override
    def move_in(self, tensor: Tensor) -> None:
        tensor.data = self.new_tensor(tensor.detach(), tensor.dtype)

    @override
    def owns(self, tensor: Tensor) -> bool:
        return bool(self._ranges([tensor]))

    def _ranges(self, tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
        ends = sorted((segment.address + segment.nbytes, segment.address) for segment in self._segments)
        ranges = []
        for tensor in tensors:
            start = tensor.data_ptr()
            place = bisect_right(ends, (start, math.inf))
            if place < len(ends) and ends[place][1] <= start:
                ranges.append((start, start + tensor.nbytes))
        return ranges

    @override
    def prefetch(self, tensors: Iterable[Tensor]) -> None:
        ranges: list[list[int]] = []  # neighbours are joined into one call
        for start, end in sorted(self._ranges(tensors)):
            if not ranges or start - ranges[-1][1] >= ALIGNMENT:
                ranges.append([start, end])
            ranges[-1][1] = end
        for start, end in ranges:
            self._prefetch_range(start, end - start)

    @override
    def _allocate(self, nbytes: int) -> int:
        runtime = self._runtime
        with torch.cuda.device(self._memory_device):  # makes torch's context current: the memory belongs to it
            error, address = runtime.cudaMallocManaged(nbytes, runtime.cudaMemAttachGlobal)
        if error == runtime.cudaError_t.cudaErrorMemoryAllocation:
            runtime.cudaGetLastError()  # clears the error, or torch's next call would report it
            raise MemoryError(error.name)
        self._check(error, "cudaMallocManaged")
        preferred_location = runtime.cudaMemoryAdvise.cudaMemAdviseSetPreferredLocation
        error = self._advise(address, nbytes, preferred_location, self._location("Host"))[0]
        self._check(error, "cudaMemAdvise")
        return int(address)

    @override
    def _free(self, address: int) -> None:
        with torch.cuda.device(self._memory_device):
            error = self._runtime.cudaFree(address)[0]  # waits for the kernels that use the memory
        self._check(error, "cudaFree")

    def _prefetch_range(self, address: int, nbytes: int) -> None:
        with torch.cuda.device(self._memory_device):  # the address of a default stream, 0, is that of any device
            stream = torch.cuda.current_stream(self._memory_device).cuda_stream
            error = self._prefetch_async(address, nbytes, self._location("Device"), 0, stream)[0]
        self._check(error, "cudaMemPrefetchAsync")

    def _location(self, kind: str) -> Any:
        location = self._runtime.cudaMemLocation()
        location.type = getattr(self._runtime.cudaMemLocationType, f"cudaMemLocationType{kind}")
        location.id = 0
        if kind == "Device":
            location.id = self._memory_device.index
        return location

    def _check(self, error: Any, call: str) -> None:
        if error != self._runtime.cudaError_t.cudaSuccess:
            self._runtime.cudaGetLastError()
            raise RuntimeError(
                f"{call} failed with {error.name} while paging optimizer state on {self._memory_device}."
            )


def why_not_managed(device: torch.device) -> str | None:
    """Why unified memory cannot page on this CUDA device, or None if it can."""
    if torch.version.hip is not None:
        return "ROCm pages unified memory only with XNACK"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return f"cuda-bindings is not installed ({install('paged')})"
    runtime = _runtime()
    for attribute, missing in (
        ("cudaDevAttrManagedMemory", "the device has no unified memory"),
        ("cudaDevAttrConcurrentManagedAccess", "unified memory does not page on demand here, as under Windows and WSL"),
    ):
        error, value = runtime.cudaDeviceGetAttribute(getattr(runtime.cudaDeviceAttr, attribute), _index(device))
        if error != runtime.cudaError_t.cudaSuccess:
            return f"cuda-bindings cannot query the driver ({error.name}); install the version that fits the driver"
        if not value:
            return missing
    return ManagedPool(device).refusal()


def _runtime() -> Any:
    from cuda.bindings import runtime

    return runtime


def _index(device: torch.device) -> int:
    if device.index is None:
        return torch.cuda.current_device()
    return device.index


class PinnedPool(Pool):
    """A `Pool` of page-locked memory. Its tensors are CPU tensors between steps and CUDA tensors in a step."""

    kind = "pinned"

    def __init__(self, device: torch.device, reason: str) -> None:
        super().__init__(torch.device("cpu"), reason)
        self._device = device
        self._pinned: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> its page-locked memory, a CPU tensor
        self._blocks: dict[int, Tensor] = {}
        self._copies = HostCopies(device)
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
            self._copies.wait(self._to_device)

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
        self._to_device = self._copies.start(pairs)

    def _copy_to_host(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._to_host = self._copies.start(pairs)
        self._copies.wait(self._to_host)
