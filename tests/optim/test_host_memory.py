"""ManagedPool and PinnedPool without a GPU: over stand-ins, with a fake driver beside the real wheel, on fake streams.

What needs a GPU is in test_gpu.py.
"""

from contextlib import nullcontext
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from lightning_qlora.checks import install
from lightning_qlora.optim import host_memory, optimizer_pages
from lightning_qlora.optim.host_memory import ManagedPool, PinnedPool, why_not_managed
from lightning_qlora.optim.pool import SEGMENT_BYTES, Segment
from tests.optim.stand_in import StandInManagedPool, StandInPinnedPool

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def managed_pool():
    return StandInManagedPool()


@pytest.fixture
def pinned_pool():
    return StandInPinnedPool()


@pytest.fixture(params=["managed_pool", "pinned_pool"])
def pool(request):
    return request.getfixturevalue(request.param)


def test_tensors_keep_the_object_values_and_type_and_do_not_overlap(pool):
    dtypes = (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool)
    tensors = [torch.randint(0, 2, (rows, 7)).to(dtype) for dtype in dtypes for rows in (33, 1, 585)]
    values = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        pool.move_in(tensor)
        pool.evict([tensor])
    pool.synchronize()
    for tensor, value in zip(tensors, values, strict=True):
        assert pool.owns(tensor) and tensor.dtype == value.dtype
        assert torch.equal(tensor, value)
        assert tensor.untyped_storage().nbytes() == value.nbytes
        assert (tensor.data_ptr() - tensors[0].data_ptr()) % 512 == 0
    last = tensors[-1].data_ptr() - tensors[0].data_ptr()
    assert last == sum(-(-value.nbytes // 512) * 512 for value in values[:-1])


def test_tensors_share_an_allocation_and_large_ones_get_their_own(pool):
    """Of pinned memory a power of two: torch rounds up to one, and other tensors use what is left."""
    half = SEGMENT_BYTES // 2
    held = []
    for nbytes, allocations, total in (
        (half, 1, SEGMENT_BYTES),
        (half, 1, SEGMENT_BYTES),
        (1, 2, 2 * SEGMENT_BYTES),
        (SEGMENT_BYTES + 4, 3, (4 if pool.kind == "pinned" else 3) * SEGMENT_BYTES + 4 * (pool.kind == "managed")),
    ):
        held.append(torch.zeros(nbytes, dtype=torch.uint8))
        pool.move_in(held[-1])
        assert (pool.counts["allocations"], pool.nbytes, pool.allocated) == (allocations, total, total)
    held.append(torch.zeros(SEGMENT_BYTES - 512, dtype=torch.uint8))
    pool.move_in(held[-1])
    assert pool.counts["allocations"] == 3


def test_memory_is_freed_with_its_last_tensor(pool):
    first = torch.zeros(5000)
    second = torch.zeros(5000)
    for tensor in (first, second):
        pool.move_in(tensor)
        pool.evict([tensor])
    view = second.view(50, 100)[3:]
    del first, second, tensor
    assert pool.allocated == SEGMENT_BYTES, "a view still uses it"
    del view
    assert (pool.counts["frees"], pool.allocated, pool.nbytes) == (1, 0, 0)


@pytest.mark.parametrize("enter", ["move_in", "new_tensor"])
def test_move_out_waits_and_frees(pool, enter):
    values = torch.randn(100, 50)
    tensor = values.clone()
    if enter == "move_in":
        pool.move_in(tensor)
        pool.evict([tensor])
    else:
        tensor = pool.new_tensor(values, torch.float32)
    pool.move_out(tensor)
    assert torch.equal(tensor, values)
    assert not pool.owns(tensor)
    assert (pool.nbytes, pool.allocated) == (0, 0)


def test_a_refusal_says_how_much_and_keeps_what_there_was(pool):
    pool.budget = SEGMENT_BYTES + 1000
    tensor = torch.ones(5000)
    pool.move_in(tensor)
    big = torch.ones(SEGMENT_BYTES // 2)
    message = rf"64\.0 MiB of {pool.kind} memory were requested and refused; 32\.0 MiB are allocated already"
    with pytest.raises(MemoryError, match=message):
        pool.move_in(big)
    assert torch.equal(tensor, torch.ones(5000))
    assert torch.equal(big, torch.ones_like(big))


def test_neighbours_are_prefetched_in_one_call(managed_pool):
    tensors = [torch.zeros(n) for n in (5000, 5000, 128, 5000)]
    for tensor in tensors:
        managed_pool.move_in(tensor)
    managed_pool.prefetch([tensors[3], tensors[0], tensors[1]])
    assert managed_pool.counts["prefetches"] == 2, "0 and 1 together, 3 apart: there are 512 bytes between"
    for tensor in (tensors[0], tensors[1], tensors[3]):
        managed_pool.touch(tensor)
    assert managed_pool.counts["faults"] == 0


def test_a_tensor_moves_to_the_host_and_back(pinned_pool):
    tensor = torch.randn(30, 5)
    values = tensor.clone()
    on_device = tensor.data_ptr()
    pinned_pool.move_in(tensor)
    assert tensor.data_ptr() == on_device, "in a step it stays on the device"
    for _ in range(2):
        pinned_pool.evict([tensor])
    pinned = tensor.data_ptr()
    assert pinned != on_device
    for _ in range(2):
        pinned_pool.prefetch([tensor])
    assert tensor.data_ptr() != pinned
    pinned_pool.wait_prefetch()
    tensor.add_(1)
    pinned_pool.evict([tensor])
    assert tensor.data_ptr() == pinned, "always the same pinned memory"
    pinned_pool.synchronize()
    assert torch.equal(tensor, values + 1)
    assert pinned_pool.log == ["store 1", "fetch 1", "wait", "store 1"], "moving twice copies once"


def test_a_new_tensor_is_on_the_host_with_the_type_asked_for(pinned_pool):
    tensor = pinned_pool.new_tensor(torch.arange(6.0).view(2, 3), torch.bfloat16)
    assert pinned_pool.owns(tensor)
    assert tensor.dtype == torch.bfloat16
    pinned_pool.evict([tensor])
    assert pinned_pool.log == []


def fake_runtime(version, calls, attributes=None, error="cudaSuccess", devices=None, of=None):
    """cuda.bindings.runtime of major version 12 or 13, recording calls; one call, or all, give the error."""
    codes = {name: SimpleNamespace(name=name) for name in ("cudaSuccess", "cudaErrorMemoryAllocation", "cudaErrorX")}
    attributes = attributes or {}

    def attribute(name, device):
        if devices is not None:
            devices.append(device)
        return codes[error if of is None else "cudaSuccess"], attributes.get(name, 1)

    def record(name, *results, parameters):
        def call(*args):
            assert len(args) == parameters, f"{name} of cuda-bindings {version} takes {parameters} arguments"
            calls.append((name, *args))
            return codes[error if of in (None, name) else "cudaSuccess"], *results

        return call

    class Location:
        def __repr__(self):
            return f"{self.type}:{self.id}"

    runtime = SimpleNamespace(
        cudaError_t=SimpleNamespace(**codes),
        cudaDeviceAttr=SimpleNamespace(
            cudaDevAttrManagedMemory="managed", cudaDevAttrConcurrentManagedAccess="concurrent"
        ),
        cudaMemLocationType=SimpleNamespace(cudaMemLocationTypeHost="host", cudaMemLocationTypeDevice="device"),
        cudaMemoryAdvise=SimpleNamespace(cudaMemAdviseSetPreferredLocation="preferred"),
        cudaMemAttachGlobal=1,
        cudaMemLocation=Location,
        cudaDeviceGetAttribute=attribute,
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
    """The devices that code enters, without one."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77 + device.index))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    return entered


@pytest.mark.parametrize("version", [12, 13])
def test_both_signatures_get_locations_of_their_own_device(monkeypatch, no_device, version):
    """Default streams of all devices have the address 0, which means that of the current device."""
    calls = []
    monkeypatch.setattr(host_memory, "_runtime", lambda: fake_runtime(version, calls))
    pool = ManagedPool(torch.device("cuda", 1))
    address = pool._allocate(1000)
    pool._prefetch_range(address, 1000)
    pool._free(address)
    assert [str(call) for call in calls] == [
        "('malloc', 1000, 1)",
        "('advise', 4096, 1000, 'preferred', host:0)",
        "('prefetch', 4096, 1000, device:1, 0, 78)",
        "('free', 4096)",
    ]
    assert no_device == 3 * [torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ("cudaErrorMemoryAllocation", MemoryError, "^cudaErrorMemoryAllocation$"),
        (
            "cudaErrorX",
            RuntimeError,
            "^cudaMallocManaged failed with cudaErrorX while paging optimizer state on cuda:0",
        ),
    ],
)
def test_errors_are_raised_and_cleared(monkeypatch, no_device, error, kind, message):
    calls = []
    monkeypatch.setattr(host_memory, "_runtime", lambda: fake_runtime(13, calls, error=error))
    with pytest.raises(kind, match=message):
        ManagedPool(DEVICE)._allocate(1000)
    assert calls == [("malloc", 1000, 1), ("clear",)]
    for name, of, use in (
        ("MemPrefetchAsync", None, lambda pool: pool._prefetch_range(4096, 10)),
        ("Free", None, lambda pool: pool._free(4096)),
        ("MemAdvise", "advise", lambda pool: pool._allocate(1000)),
    ):
        monkeypatch.setattr(host_memory, "_runtime", lambda of=of: fake_runtime(13, calls, error=error, of=of))
        with pytest.raises(RuntimeError, match=f"cuda{name} failed with {error} while paging"):
            use(ManagedPool(DEVICE))


def test_reasons_why_memory_is_not_managed(monkeypatch, no_device):
    for attributes, reason in (
        ({}, None),
        ({"managed": 0}, "the device has no unified memory"),
        ({"concurrent": 0}, "unified memory does not page on demand here, as under Windows and WSL"),
    ):
        asked = []
        runtime = fake_runtime(13, [], attributes, devices=asked)
        monkeypatch.setattr(host_memory, "_runtime", lambda runtime=runtime: runtime)
        monkeypatch.setattr(host_memory, "find_spec", lambda name: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
        assert why_not_managed(torch.device("cuda", 3)) == reason
        assert why_not_managed(torch.device("cuda")) == reason
        assert set(asked) == {3, 2}
    for missing in ({"cuda.bindings"}, {"cuda", "cuda.bindings"}):
        monkeypatch.setattr(host_memory, "find_spec", lambda name, missing=missing: name not in missing or None)
        assert why_not_managed(DEVICE) == f"cuda-bindings is not installed ({install('paged')})"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert why_not_managed(DEVICE) == "ROCm pages unified memory only with XNACK"


@pytest.mark.parametrize(
    ("call", "name"), [("malloc", "MallocManaged"), ("advise", "MemAdvise"), ("prefetch", "MemPrefetchAsync")]
)
def test_a_driver_that_refuses_one_page_gives_pinned_memory(monkeypatch, no_device, call, name):
    """Its attributes promise unified memory; the run goes on."""
    monkeypatch.setattr(host_memory, "_runtime", lambda: fake_runtime(13, [], error="cudaErrorX", of=call))
    monkeypatch.setattr(host_memory, "find_spec", lambda name: True)
    monkeypatch.setattr(optimizer_pages, "PinnedPool", lambda device, reason: (device, reason))
    device, reason = optimizer_pages.open_pool(DEVICE)
    assert device == DEVICE
    assert reason == f"cuda{name} failed with cudaErrorX while paging optimizer state on {DEVICE}"


def test_the_real_wheel_has_every_call_with_these_signatures():
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


class FakeStream:
    """A stream and its events: records who waits for whom."""

    def __init__(self, name, log):
        self.name = name
        self.log = log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.name}")

    def record_event(self):
        return FakeStream(f"event {sum('copy' in entry for entry in self.log)}", self.log)

    def synchronize(self):
        self.log.append(f"CPU waits for {self.name}")

    def __enter__(self):
        self.log.append("copy")

    def __exit__(self, *error):
        pass


@pytest.fixture
def log(monkeypatch):
    """The calls of a real PinnedPool; "device memory" is on the CPU, nothing is page-locked."""
    log = []
    empty = torch.empty
    copy = torch.Tensor.copy_

    def copy_(target, source, non_blocking=False):
        assert non_blocking is (log[-1:] == ["copy"]), "on the stream of the copies"
        return copy(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("copies", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream("compute", log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"CPU waits for {device}"))

    def pinned(*size, pin_memory, **options):
        assert pin_memory and options == {"dtype": torch.uint8, "device": "cpu"}
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", pinned)
    return log


def test_the_device_waits_for_copies_and_the_cpu_only_when_it_reads(log):
    pool = PinnedPool(torch.device("cpu"), "a test")
    tensor = torch.ones(5000)
    pool.move_in(tensor)
    pool.evict([tensor])
    pool.prefetch([tensor])
    pool.wait_prefetch()
    tensor += 1
    pool.evict([tensor])
    moves = (("copies waits for compute", "copy", f"compute waits for event {i}") for i in (1, 2, 3))
    assert log == [*chain(*moves)], "to the host, back, and to the host"
    log.clear()
    pool.synchronize()
    pool.synchronize()
    assert log == ["CPU waits for event 3"], "once, and for the last copy to the host alone"
    assert torch.equal(tensor, torch.full((5000,), 2.0))


def test_memory_is_not_freed_while_a_copy_may_use_it(log):
    """Nor while another stream copies from it: Lightning resumes with `.to(device, non_blocking=True)`."""
    pool = PinnedPool(torch.device("cpu"), "a test")
    tensor = torch.ones(5000)
    pool.move_in(tensor)
    pool.evict([tensor])
    log.clear()
    del tensor
    assert log == ["CPU waits for cpu"], "for the whole device"
    assert pool.nbytes == 0 and not pool._blocks


def test_no_page_locked_memory_is_a_memory_error(log, monkeypatch):
    def refuse(*size, **options):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(MemoryError, match="requested and refused") as error:
        PinnedPool(torch.device("cpu"), "a test").move_in(torch.ones(5000))
    assert "out of memory" in str(error.value.__cause__)
