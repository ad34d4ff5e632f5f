"""The CUDA calls behind the pools, and nothing else. cuda-bindings is imported when a pool is opened, never before.

Works with cuda-bindings 12.x and 13.x: from 13.0 on `cudaMemAdvise` and `cudaMemPrefetchAsync` take a location and not
a device number; 12.x has these forms under the suffix `_v2`.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def why_not_managed(device: torch.device) -> str | None:
    """Why unified memory cannot page on this CUDA device, or None if it can."""
    if torch.version.hip is not None:
        return "ROCm pages unified memory only with XNACK"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return "cuda-bindings is not installed (pip install 'lightning-qlora[paged]')"
    runtime = _runtime()
    for attribute, missing in (
        ("cudaDevAttrManagedMemory", "the device has no unified memory"),
        ("cudaDevAttrConcurrentManagedAccess", "unified memory does not page on demand here, as under Windows and WSL"),
    ):
        error, value = runtime.cudaDeviceGetAttribute(getattr(runtime.cudaDeviceAttr, attribute), _index(device))
        if error != runtime.cudaError_t.cudaSuccess:
            return f"cuda-bindings cannot ask the driver ({error.name}); install the version that fits the driver"
        if not value:
            return missing
    return None


class CudaUnifiedMemory:
    """`managed.UnifiedMemory` on a CUDA device with concurrent managed access."""

    def __init__(self, device: torch.device) -> None:
        runtime = _runtime()
        self._device = torch.device("cuda", _index(device))
        self._runtime = runtime
        self._advise = getattr(runtime, "cudaMemAdvise_v2", runtime.cudaMemAdvise)
        self._prefetch = getattr(runtime, "cudaMemPrefetchAsync_v2", runtime.cudaMemPrefetchAsync)
        self._on_host = _location(runtime, "cudaMemLocationTypeHost", 0)
        self._on_device = _location(runtime, "cudaMemLocationTypeDevice", _index(device))

    def allocate(self, nbytes: int) -> int:
        """Unified memory that prefers the host; MemoryError if the driver has none."""
        runtime = self._runtime
        with torch.cuda.device(self._device):  # makes torch's context current: the memory belongs to it
            error, address = runtime.cudaMallocManaged(nbytes, runtime.cudaMemAttachGlobal)
        if error == runtime.cudaError_t.cudaErrorMemoryAllocation:
            runtime.cudaGetLastError()  # clears it, or torch's next call would report it
            raise MemoryError(error.name)
        self._check(error, "cudaMallocManaged")
        preferred = runtime.cudaMemoryAdvise.cudaMemAdviseSetPreferredLocation
        self._check(self._advise(address, nbytes, preferred, self._on_host)[0], "cudaMemAdvise")
        return int(address)

    def free(self, address: int) -> None:
        """`cudaFree` waits for the kernels that use the memory."""
        self._check(self._runtime.cudaFree(address)[0], "cudaFree")

    def prefetch(self, address: int, nbytes: int) -> None:
        """Move a range to the device on torch's current stream."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._check(self._prefetch(address, nbytes, self._on_device, 0, stream)[0], "cudaMemPrefetchAsync")

    def tensor(self, address: int, nbytes: int, owner: object) -> Tensor:
        """A CUDA tensor over the memory, uint8 [nbytes]."""
        tensor = torch.as_tensor(_Span(address, nbytes, owner), device=self._device)
        if tensor.data_ptr() != address:
            raise RuntimeError(f"torch copied unified memory of {self._device} instead of sharing it.")
        return tensor

    def _check(self, error: Any, call: str) -> None:
        if error != self._runtime.cudaError_t.cudaSuccess:
            self._runtime.cudaGetLastError()
            raise RuntimeError(f"{call} failed with {error.name} while paging optimizer state on {self._device}.")


class CudaTransfers:
    """`pinned.Transfers` on a CUDA or ROCm device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._fetched: torch.cuda.Event | None = None

    def host_empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Page-locked host memory; MemoryError if there is none."""
        try:
            return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            raise MemoryError(str(error)) from error

    def device_empty(self, like: Tensor) -> Tensor:
        """Device memory of the shape, strides and type of `like`."""
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=self._device)

    def fetch(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Start copies to the device."""
        self._copy(pairs)
        self._fetched = self._stream.record_event()

    def arrive(self) -> None:
        """Let kernels started from here on wait for the last `fetch`."""
        if self._fetched is not None:
            torch.cuda.current_stream(self._device).wait_event(self._fetched)

    def store(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Start copies to the host."""
        self._copy(pairs)

    def synchronize(self) -> None:
        """Wait for all copies."""
        self._stream.synchronize()

    @torch.no_grad()
    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        # Kernels started before may still write the source, or use memory that torch has given to the target since.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                (target if target.is_cuda else source).record_stream(self._stream)


class _Span:
    """A range of unified memory, as numba's CUDA array interface (version 3) describes it to torch."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner  # torch keeps this object, and so the allocation, as long as a tensor uses it
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def _runtime() -> Any:
    from cuda.bindings import runtime

    return runtime


def _location(runtime: Any, kind: str, index: int) -> Any:
    location = runtime.cudaMemLocation()
    location.type = getattr(runtime.cudaMemLocationType, kind)
    location.id = index
    return location


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
