"""The thin CUDA layer: against the real cuda-bindings wheel, and against both of its signatures, with no GPU.

What needs a card is in test_gpu.py.
"""

import inspect
from types import SimpleNamespace

import pytest
import torch

from lightning_qlora.paging import cuda
from lightning_qlora.paging.cuda import CudaTransfers, CudaUnifiedMemory, why_not_managed
from lightning_qlora.paging.managed import UnifiedMemory
from lightning_qlora.paging.pinned import Transfers

DEVICE = torch.device("cuda", 0)


class Enum(SimpleNamespace):
    """cuda-bindings' enumerations, as far as we read them."""


def fake_runtime(version, calls, attributes=None, error="cudaSuccess"):
    """cuda.bindings.runtime of major version 12 or 13, recording calls."""
    codes = {name: SimpleNamespace(name=name) for name in ("cudaSuccess", "cudaErrorMemoryAllocation", "cudaErrorX")}
    attributes = attributes or {}

    def record(name, *results, parameters):
        def call(*args):
            assert len(args) == parameters, f"{name} of cuda-bindings {version} takes {parameters} arguments"
            calls.append((name, *args))
            return codes[error], *results

        return call

    class Location:
        def __repr__(self):
            return f"{self.type}:{self.id}"

    runtime = SimpleNamespace(
        cudaError_t=Enum(**codes),
        cudaDeviceAttr=Enum(cudaDevAttrManagedMemory="managed", cudaDevAttrConcurrentManagedAccess="concurrent"),
        cudaMemLocationType=Enum(cudaMemLocationTypeHost="host", cudaMemLocationTypeDevice="device"),
        cudaMemoryAdvise=Enum(cudaMemAdviseSetPreferredLocation="preferred"),
        cudaMemAttachGlobal=1,
        cudaMemLocation=Location,
        cudaDeviceGetAttribute=lambda attribute, device: (codes[error], attributes.get(attribute, 1)),
        cudaMallocManaged=record("malloc", 4096, parameters=2),
        cudaFree=record("free", parameters=1),
        cudaGetLastError=record("clear", parameters=0),
        cudaMemAdvise=record("advise", parameters=4),
        cudaMemPrefetchAsync=record("prefetch", parameters=5 if version >= 13 else 4),
    )
    if version < 13:
        runtime.cudaMemAdvise_v2 = record("advise", parameters=4)
        runtime.cudaMemPrefetchAsync_v2 = record("prefetch", parameters=5)
    return runtime


@pytest.fixture
def no_device(monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))


@pytest.mark.parametrize("version", [12, 13])
def test_both_signatures_get_locations(monkeypatch, no_device, version):
    calls = []
    monkeypatch.setattr(cuda, "_runtime", lambda: fake_runtime(version, calls))
    memory = CudaUnifiedMemory(DEVICE)
    address = memory.allocate(1000)
    memory.prefetch(address, 1000)
    memory.free(address)
    assert [str(call) for call in calls] == [
        "('malloc', 1000, 1)",
        "('advise', 4096, 1000, 'preferred', host:0)",
        "('prefetch', 4096, 1000, device:0, 0, 77)",
        "('free', 4096)",
    ]


def test_no_memory_is_a_memory_error_and_the_error_is_cleared(monkeypatch, no_device):
    calls = []
    monkeypatch.setattr(cuda, "_runtime", lambda: fake_runtime(13, calls, error="cudaErrorMemoryAllocation"))
    with pytest.raises(MemoryError, match="cudaErrorMemoryAllocation"):
        CudaUnifiedMemory(DEVICE).allocate(1000)
    assert calls[-1] == ("clear",)


def test_any_other_error_names_the_call(monkeypatch, no_device):
    monkeypatch.setattr(cuda, "_runtime", lambda: fake_runtime(13, [], error="cudaErrorX"))
    with pytest.raises(RuntimeError, match="cudaMemPrefetchAsync failed with cudaErrorX while paging"):
        CudaUnifiedMemory(DEVICE).prefetch(4096, 10)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({}, None),
        ({"managed": 0}, "no unified memory"),
        ({"concurrent": 0}, "WSL"),
    ],
)
def test_managed_memory_needs_concurrent_access(monkeypatch, attributes, reason):
    monkeypatch.setattr(cuda, "_runtime", lambda: fake_runtime(13, [], attributes))
    answer = why_not_managed(DEVICE)
    assert answer is None if reason is None else reason in answer


def test_rocm_and_a_missing_wheel_are_reasons(monkeypatch):
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert "pip install 'lightning-qlora[paged]'" in why_not_managed(DEVICE)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in why_not_managed(DEVICE)


def test_the_real_wheel_has_every_call_with_these_signatures():
    """Compiled against the wheel that is installed: names, argument order, enumerations."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    prefetch = getattr(runtime, "cudaMemPrefetchAsync_v2", runtime.cudaMemPrefetchAsync)
    advise = getattr(runtime, "cudaMemAdvise_v2", runtime.cudaMemAdvise)
    assert (
        "devPtr, size_t count, cudaMemLocation location: cudaMemLocation, unsigned int flags, stream"
        in prefetch.__doc__
    )
    assert "devPtr, size_t count, advice: cudaMemoryAdvise, cudaMemLocation location: cudaMemLocation" in advise.__doc__
    assert runtime.cudaMemLocationType.cudaMemLocationTypeHost
    assert runtime.cudaMemoryAdvise.cudaMemAdviseSetPreferredLocation
    assert runtime.cudaDeviceAttr.cudaDevAttrConcurrentManagedAccess
    cuda._location(runtime, "cudaMemLocationTypeDevice", 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a driver")
def test_without_a_driver_the_real_wheel_gives_a_reason_and_no_crash():
    pytest.importorskip("cuda.bindings.runtime")
    assert "cannot ask the driver (cudaErrorInsufficientDriver)" in why_not_managed(DEVICE)


@pytest.mark.parametrize(("real", "face"), [(CudaUnifiedMemory, UnifiedMemory), (CudaTransfers, Transfers)])
def test_the_real_calls_have_the_face_the_stand_ins_have(real, face):
    for name, method in inspect.getmembers(face, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(getattr(real, name)).parameters) == list(inspect.signature(method).parameters)


def test_the_span_describes_the_memory_to_torch():
    owner = object()
    span = cuda._Span(4096, 10, owner)
    assert span.owner is owner
    assert span.__cuda_array_interface__ == {"shape": (10,), "typestr": "|u1", "data": (4096, False), "version": 3}
