import gc

import pytest
import torch

from lightning_qlora.paging.pinned import PinnedPool
from tests.paging.stand_in import StandInTransfers


@pytest.fixture
def transfers():
    return StandInTransfers()


@pytest.fixture
def pool(transfers):
    return PinnedPool(transfers, "a test")


def test_a_tensor_goes_home_and_comes_back(pool, transfers):
    tensor = torch.randn(30, 5)
    values, on_device = tensor.clone(), tensor.data_ptr()
    pool.adopt(tensor)
    assert tensor.data_ptr() == on_device, "in a step it stays on the device"
    pool.to_host([tensor])
    home = tensor.data_ptr()
    assert home != on_device
    pool.to_device([tensor])
    assert tensor.data_ptr() != home
    tensor.add_(1)
    pool.to_host([tensor])
    assert tensor.data_ptr() == home, "always the same pinned memory"
    assert torch.equal(tensor, values + 1)
    assert transfers.log == ["store 1", "fetch 1", "store 1"]


def test_moving_twice_copies_once(pool, transfers):
    tensor = torch.zeros(10)
    pool.adopt(tensor)
    pool.to_host([tensor])
    pool.to_host([tensor])
    pool.to_device([tensor])
    pool.to_device([tensor])
    assert transfers.log == ["store 1", "store 0", "fetch 1", "fetch 0"]


def test_place_starts_at_home_with_the_type_asked_for(pool, transfers):
    tensor = pool.place(torch.arange(6.0).view(2, 3), torch.bfloat16)
    assert pool.owns(tensor)
    assert tensor.dtype == torch.bfloat16
    pool.to_host([tensor])
    assert transfers.log == ["store 0"]


def test_homes_go_with_their_tensors(pool):
    tensor = torch.zeros(100)
    pool.adopt(tensor)
    assert pool.nbytes == 400
    del tensor
    gc.collect()
    assert pool.nbytes == 0


def test_release_waits_and_gives_the_home_back(pool, transfers):
    tensor = torch.ones(100)
    pool.adopt(tensor)
    pool.to_host([tensor])
    pool.release(tensor)
    assert not transfers.pending
    assert not pool.owns(tensor)
    assert pool.nbytes == 0
    assert torch.equal(tensor, torch.ones(100))


def test_a_refusal_says_how_much(pool, transfers):
    transfers.budget = 100
    with pytest.raises(MemoryError, match=r"4\.0 MiB of pinned memory were asked for and refused; 0\.0 MiB are held"):
        pool.adopt(torch.zeros(2**20))
