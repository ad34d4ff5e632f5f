import gc

import pytest
import torch

from lightning_qlora.paging.managed import ALIGNMENT, SEGMENT_BYTES, ManagedPool
from tests.paging.stand_in import StandInMemory


@pytest.fixture
def memory():
    return StandInMemory()


@pytest.fixture
def pool(memory):
    return ManagedPool(memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
def test_adopt_keeps_the_object_its_values_and_its_type(pool, dtype):
    tensor = torch.randint(0, 2, (33, 7)).to(dtype)
    values, alias = tensor.clone(), tensor
    pool.adopt(tensor)
    assert pool.owns(tensor)
    assert tensor is alias
    assert tensor.dtype == dtype
    assert torch.equal(tensor, values)


def test_tensors_are_aligned_and_do_not_overlap(pool):
    tensors = [torch.full((n,), float(n)) for n in (1, 100, 4097, 3)]
    for tensor in tensors:
        pool.adopt(tensor)
    assert all(torch.equal(t, torch.full_like(t, t.numel())) for t in tensors)
    assert len({(t.data_ptr() - tensors[0].data_ptr()) % ALIGNMENT for t in tensors}) == 1


def test_each_tensor_has_a_storage_of_its_own_size(pool):
    tensor = torch.zeros(5000)
    pool.adopt(tensor)
    assert tensor.untyped_storage().nbytes() == 20000


def test_small_tensors_share_an_allocation_and_large_ones_get_their_own(pool, memory):
    small = [torch.zeros(5000) for _ in range(10)]
    for tensor in small:
        pool.adopt(tensor)
    assert (memory.allocations, pool.nbytes) == (1, SEGMENT_BYTES)
    large = torch.zeros(SEGMENT_BYTES // 4 + 1)
    pool.adopt(large)
    assert (memory.allocations, pool.nbytes) == (2, SEGMENT_BYTES + 4 * large.numel())


def test_memory_is_freed_with_its_last_tensor(pool, memory):
    first, second = torch.zeros(5000), torch.zeros(5000)
    pool.adopt(first)
    pool.adopt(second)
    view = second.view(50, 100)[3:]
    del first, second
    gc.collect()
    assert memory.frees == 0, "a view still uses it"
    del view
    gc.collect()
    assert (memory.frees, memory.nbytes, pool.nbytes) == (1, 0, 0)


@pytest.mark.parametrize("enter", ["adopt", "place"])
def test_release_moves_out_and_frees(pool, memory, enter):
    values = torch.randn(100, 50)
    tensor = values.clone()
    if enter == "adopt":
        pool.adopt(tensor)
    else:
        tensor = pool.place(values, torch.float32)
    pool.release(tensor)
    assert torch.equal(tensor, values)
    assert not pool.owns(tensor)
    assert memory.nbytes == 0


def test_neighbours_are_prefetched_in_one_call(pool, memory):
    tensors = [torch.zeros(5000) for _ in range(4)]
    for tensor in tensors:
        pool.adopt(tensor)
    pool.to_device([tensors[3], tensors[0], tensors[1]])
    assert memory.prefetches == 2, "0 and 1 together, 3 apart"
    for tensor in (tensors[0], tensors[1], tensors[3]):
        memory.touch(tensor)
    assert memory.faults == 0
    memory.touch(tensors[2])
    assert memory.faults > 0


def test_a_refusal_says_how_much_and_keeps_what_there_was(memory):
    pool = ManagedPool(memory)
    memory.budget = SEGMENT_BYTES + 1000
    tensor = torch.ones(5000)
    pool.adopt(tensor)
    big = torch.ones(SEGMENT_BYTES // 2)
    with pytest.raises(
        MemoryError, match=r"64\.0 MiB of managed memory were asked for and refused; 32\.0 MiB are held"
    ):
        pool.adopt(big)
    assert torch.equal(tensor, torch.ones(5000))
    assert torch.equal(big, torch.ones_like(big))
