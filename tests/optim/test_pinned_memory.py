"""PinnedPool without a GPU: the pool over a stand-in, and the order of its CUDA calls on fake streams."""

import gc
import inspect

import pytest
import torch

from lightning_qlora.optim.host_memory import PinnedPool
from lightning_qlora.optim.pool import SEGMENT_BYTES
from tests.optim.stand_in import StandInPinnedPool


@pytest.fixture
def pool():
    return StandInPinnedPool()


def test_a_tensor_moves_to_the_host_and_back(pool):
    tensor = torch.randn(30, 5)
    values = tensor.clone()
    on_device = tensor.data_ptr()
    pool.move_in(tensor)
    assert tensor.data_ptr() == on_device, "in a step it stays on the device"
    pool.evict([tensor])
    pinned = tensor.data_ptr()
    assert pinned != on_device
    pool.prefetch([tensor])
    assert tensor.data_ptr() != pinned
    pool.wait_prefetch()
    tensor.add_(1)
    pool.evict([tensor])
    assert tensor.data_ptr() == pinned, "always the same pinned memory"
    pool.synchronize()
    assert torch.equal(tensor, values + 1)
    assert pool.log == ["store 1", "fetch 1", "wait", "store 1"]


def test_moving_twice_copies_once(pool):
    tensor = torch.zeros(10)
    pool.move_in(tensor)
    for _ in range(2):
        pool.evict([tensor])
    for _ in range(2):
        pool.prefetch([tensor])
    assert pool.log == ["store 1", "fetch 1"]


def test_a_new_tensor_is_on_the_host_with_the_type_asked_for(pool):
    tensor = pool.new_tensor(torch.arange(6.0).view(2, 3), torch.bfloat16)
    assert pool.owns(tensor)
    assert tensor.dtype == torch.bfloat16
    pool.evict([tensor])
    assert pool.log == []


def test_small_tensors_share_a_segment_and_every_allocated_byte_is_counted(pool):
    """torch's pinned allocator rounds up to a power of two, so segments are one, and other tensors use what is left."""
    small = [torch.zeros(1000) for _ in range(100)]
    for tensor in small:
        pool.move_in(tensor)
    assert (pool.counts["allocations"], pool.nbytes, pool.allocated) == (1, SEGMENT_BYTES, SEGMENT_BYTES)
    large = torch.zeros(2 * SEGMENT_BYTES + 4, dtype=torch.uint8)
    pool.move_in(large)
    assert (pool.nbytes, pool.allocated) == (5 * SEGMENT_BYTES, 5 * SEGMENT_BYTES)
    pool.move_in(torch.zeros(SEGMENT_BYTES // 4 + 1))
    assert pool.counts["allocations"] == 2


def test_memory_is_freed_with_its_last_tensor(pool):
    first = torch.zeros(100)
    second = torch.zeros(100)
    pool.move_in(first)
    pool.move_in(second)
    pool.evict([first])
    del first
    gc.collect()
    assert pool.allocated == SEGMENT_BYTES
    del second
    gc.collect()
    assert (pool.nbytes, pool.allocated) == (0, 0)


def test_each_tensor_has_a_storage_of_its_own_size(pool):
    tensor = torch.zeros(5000)
    pool.move_in(tensor)
    pool.evict([tensor])
    assert tensor.untyped_storage().nbytes() == 20000


def test_move_out_waits_and_frees(pool):
    tensor = torch.ones(100)
    pool.move_in(tensor)
    pool.evict([tensor])
    pool.move_out(tensor)
    assert not pool.to_host
    assert not pool.owns(tensor)
    assert pool.nbytes == 0
    assert torch.equal(tensor, torch.ones(100))


def test_a_refusal_says_how_much(pool):
    pool.budget = 100
    message = r"32\.0 MiB of pinned memory were requested and refused; 0\.0 MiB are allocated already"
    with pytest.raises(MemoryError, match=message):
        pool.move_in(torch.zeros(2**20))


def test_the_stand_in_has_the_signatures_of_the_real_pool():
    for name in ("_allocate", "_free", "_copy_to_device", "wait_prefetch", "_copy_to_host", "synchronize"):
        ours, real = (inspect.signature(getattr(kind, name)) for kind in (StandInPinnedPool, PinnedPool))
        assert list(ours.parameters) == list(real.parameters)


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
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("copies", log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream("compute", log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append(f"CPU waits for {device}"))
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory, **options: empty(*size, **options))
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
    store_1 = ["copies waits for compute", "copy", "compute waits for event 1"]
    fetch_2 = ["copies waits for compute", "copy", "compute waits for event 2"]
    store_3 = ["copies waits for compute", "copy", "compute waits for event 3"]
    assert log == store_1 + fetch_2 + store_3
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
    gc.collect()
    assert log == ["CPU waits for cpu"], "for the whole device"
    assert pool.nbytes == 0


def test_no_page_locked_memory_is_a_memory_error(log, monkeypatch):
    def refuse(*size, **options):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(MemoryError, match="requested and refused") as error:
        PinnedPool(torch.device("cpu"), "a test").move_in(torch.ones(5000))
    assert "out of memory" in str(error.value.__cause__)
