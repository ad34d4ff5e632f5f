"""ManagedPool without a GPU: the pool over a stand-in, the CUDA calls against the real wheel and a fake driver.

What needs a GPU is in test_gpu.py.
"""

import gc
import inspect
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lightning_qlora.optim import host_memory
from lightning_qlora.optim.host_memory import ManagedPool, why_not_managed
from lightning_qlora.optim.pool import ALIGNMENT, SEGMENT_BYTES, Segment
from tests.optim.stand_in import StandInManagedPool

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def pool():
    return StandInManagedPool()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
def test_move_in_keeps_the_object_its_values_and_its_type(pool, dtype):
    tensor = torch.randint(0, 2, (33, 7)).to(dtype)
    values = tensor.clone()
    alias = tensor
    pool.move_in(tensor)
    assert pool.owns(tensor)
    assert tensor is alias
    assert tensor.dtype == dtype
    assert torch.equal(tensor, values)


def test_tensors_are_aligned_and_do_not_overlap(pool):
    tensors = [torch.full((n,), float(n)) for n in (1, 100, 4097, 3)]
    for tensor in tensors:
        pool.move_in(tensor)
    assert all(torch.equal(t, torch.full_like(t, t.numel())) for t in tensors)
    assert len({(t.data_ptr() - tensors[0].data_ptr()) % ALIGNMENT for t in tensors}) == 1


def test_each_tensor_has_a_storage_of_its_own_size(pool):
    tensor = torch.zeros(5000)
    pool.move_in(tensor)
    assert tensor.untyped_storage().nbytes() == 20000


def test_small_tensors_share_an_allocation_and_large_ones_get_their_own(pool):
    small = [torch.zeros(5000) for _ in range(10)]
    for tensor in small:
        pool.move_in(tensor)
    assert (pool.counts["allocations"], pool.nbytes) == (1, SEGMENT_BYTES)
    large = torch.zeros(SEGMENT_BYTES // 4 + 1)
    pool.move_in(large)
    assert (pool.counts["allocations"], pool.nbytes) == (2, SEGMENT_BYTES + 4 * large.numel())


def test_memory_is_freed_with_its_last_tensor(pool):
    first = torch.zeros(5000)
    second = torch.zeros(5000)
    pool.move_in(first)
    pool.move_in(second)
    view = second.view(50, 100)[3:]
    del first, second
    gc.collect()
    assert pool.counts["frees"] == 0, "a view still uses it"
    del view
    gc.collect()
    assert (pool.counts["frees"], pool.allocated, pool.nbytes) == (1, 0, 0)


@pytest.mark.parametrize("enter", ["move_in", "new_tensor"])
def test_move_out_frees(pool, enter):
    values = torch.randn(100, 50)
    tensor = values.clone()
    if enter == "move_in":
        pool.move_in(tensor)
    else:
        tensor = pool.new_tensor(values, torch.float32)
    pool.move_out(tensor)
    assert torch.equal(tensor, values)
    assert not pool.owns(tensor)
    assert pool.allocated == 0


def test_neighbours_are_prefetched_in_one_call(pool):
    tensors = [torch.zeros(5000) for _ in range(4)]
    for tensor in tensors:
        pool.move_in(tensor)
    pool.prefetch([tensors[3], tensors[0], tensors[1]])
    assert pool.counts["prefetches"] == 2, "0 and 1 together, 3 apart"
    for tensor in (tensors[0], tensors[1], tensors[3]):
        pool.touch(tensor)
    assert pool.counts["faults"] == 0
    pool.touch(tensors[2])
    assert pool.counts["faults"] > 0


def test_a_refusal_says_how_much_and_keeps_what_there_was(pool):
    pool.budget = SEGMENT_BYTES + 1000
    tensor = torch.ones(5000)
    pool.move_in(tensor)
    big = torch.ones(SEGMENT_BYTES // 2)
    message = r"64\.0 MiB of managed memory were requested and refused; 32\.0 MiB are allocated already"
    with pytest.raises(MemoryError, match=message):
        pool.move_in(big)
    assert torch.equal(tensor, torch.ones(5000))
    assert torch.equal(big, torch.ones_like(big))


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
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))


def test_a_prefetch_goes_to_the_stream_of_its_own_device(monkeypatch, no_device):
    """Default streams of all devices have the address 0, which means that of the current device."""
    entered = []
    calls = []
    monkeypatch.setattr(host_memory, "_runtime", lambda: fake_runtime(13, calls))
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    ManagedPool(torch.device("cuda", 1))._prefetch_range(4096, 10)
    assert entered == [torch.device("cuda", 1)]
    assert calls[0][0] == "prefetch"


@pytest.mark.parametrize("version", [12, 13])
def test_both_signatures_get_locations(monkeypatch, no_device, version):
    calls = []
    monkeypatch.setattr(host_memory, "_runtime", lambda: fake_runtime(version, calls))
    pool = ManagedPool(DEVICE)
    address = pool._allocate(1000)
    pool._prefetch_range(address, 1000)
    pool._free(address)
    assert [str(call) for call in calls] == [
        "('malloc', 1000, 1)",
        "('advise', 4096, 1000, 'preferred', host:0)",
        "('prefetch', 4096, 1000, device:0, 0, 77)",
        "('free', 4096)",
    ]


def test_no_memory_is_a_memory_error_and_the_error_is_cleared(monkeypatch, no_device):
    calls = []
    monkeypatch.setattr(host_memory, "_runtime", lambda: fake_runtime(13, calls, error="cudaErrorMemoryAllocation"))
    with pytest.raises(MemoryError, match="cudaErrorMemoryAllocation"):
        ManagedPool(DEVICE)._allocate(1000)
    assert calls[-1] == ("clear",)


def test_any_other_error_names_the_call(monkeypatch, no_device):
    monkeypatch.setattr(host_memory, "_runtime", lambda: fake_runtime(13, [], error="cudaErrorX"))
    with pytest.raises(RuntimeError, match="cudaMemPrefetchAsync failed with cudaErrorX while paging"):
        ManagedPool(DEVICE)._prefetch_range(4096, 10)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({}, None),
        ({"managed": 0}, "no unified memory"),
        ({"concurrent": 0}, "WSL"),
    ],
)
def test_managed_memory_needs_concurrent_access(monkeypatch, attributes, reason):
    pytest.importorskip("cuda.bindings.runtime")
    monkeypatch.setattr(host_memory, "_runtime", lambda: fake_runtime(13, [], attributes))
    answer = why_not_managed(DEVICE)
    assert answer is None if reason is None else reason in answer


def test_rocm_and_a_missing_wheel_are_reasons(monkeypatch):
    monkeypatch.setattr(host_memory, "find_spec", lambda name: None)
    assert 'pip install ".[paged]" in a clone' in why_not_managed(DEVICE)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in why_not_managed(DEVICE)


def test_the_real_wheel_has_every_call_with_these_signatures():
    """Names, argument order and enumerations of the wheel that is installed."""
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
    location = ManagedPool(torch.device("cuda", 3))._location("Device")
    assert (location.type, location.id) == (runtime.cudaMemLocationType.cudaMemLocationTypeDevice, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a driver")
def test_without_a_driver_the_real_wheel_gives_a_reason_and_no_crash():
    pytest.importorskip("cuda.bindings.runtime")
    assert "cannot query the driver (cudaErrorInsufficientDriver)" in why_not_managed(DEVICE)


def test_the_stand_in_has_the_signatures_of_the_real_pool():
    for name in ("_allocate", "_free", "_prefetch_range"):
        ours, real = (inspect.signature(getattr(kind, name)) for kind in (StandInManagedPool, ManagedPool))
        assert list(ours.parameters) == list(real.parameters)


def test_cuda_tensors_are_made_over_the_memory_and_keep_the_segment(monkeypatch):
    spans = []

    def as_tensor(span, device):
        spans.append((span, device))
        return torch.zeros(10)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    segment = Segment(StandInManagedPool(), 1000)
    with pytest.raises(RuntimeError, match="torch copied memory of cuda:0"):
        segment.tensor(10, DEVICE)
    span, device = spans[0]
    assert (span.segment, device) == (segment, DEVICE)
    expected = {"shape": (10,), "typestr": "|u1", "data": (segment.address, False), "version": 3}
    assert span.__cuda_array_interface__ == expected
