"""ManagedPool: optimizer state in CUDA unified memory.

Unified ("managed") memory has the same address on the CPU and on the GPU, and its pages move between them. We tell the
driver to prefer the host, and prefetch the pages before each optimizer step. When forward and backward need GPU memory,
the driver evicts the pages. This is how the QLoRA paper (section 3, "Paged Optimizers") avoids running out of memory on
long sequences.

Why not `torch.cuda.MemPool`: its bytes count against `set_per_process_memory_fraction` as device memory, it does not
work with `expandable_segments:True`, and it frees nothing before `empty_cache()`. Here `__cuda_array_interface__` gives
torch tensors over the memory.

cuda-bindings is imported when the first pool is opened. Versions 12 and 13 both work: from 13 on `cudaMemAdvise` and
`cudaMemPrefetchAsync` take a location in place of a device number; in 12 these forms have the suffix `_v2`.
"""

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_qlora.optim.paging.pool import ALIGNMENT, Pool
from lightning_qlora.words import install


class ManagedPool(Pool):
    """A `Pool` of CUDA unified memory. Its tensors are CUDA tensors at all times.

    Prefetches are in order with the kernels, which can also read a page that is on the host. The driver evicts pages
    when it needs their device memory, and torch synchronizes when it copies a tensor to the CPU.
    """

    kind = "managed"

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cuda", _index(device)))
        runtime = _runtime()
        self._runtime = runtime
        self._advise = getattr(runtime, "cudaMemAdvise_v2", runtime.cudaMemAdvise)
        self._prefetch_async = getattr(runtime, "cudaMemPrefetchAsync_v2", runtime.cudaMemPrefetchAsync)

    @override
    def move_in(self, tensor: Tensor) -> None:
        tensor.data = self.new_tensor(tensor.detach(), tensor.dtype)

    @override
    def owns(self, tensor: Tensor) -> bool:
        return bool(self._ranges([tensor]))

    def _ranges(self, tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
        """The (start, end) addresses of those tensors that are in the pool."""
        segments = [(segment.address, segment.address + segment.nbytes) for segment in self._segments]
        ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        return [(a, b) for a, b in ranges if any(start <= a < end for start, end in segments)]

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
        self._check(self._runtime.cudaFree(address)[0], "cudaFree")  # waits for the kernels that use the memory

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
    return None


def _runtime() -> Any:
    from cuda.bindings import runtime

    return runtime


def _index(device: torch.device) -> int:
    if device.index is None:
        return torch.cuda.current_device()
    return device.index
