import pytest
import torch

from tests.paging.stand_in import StandIn


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["managed", "pinned"])
def stand_in(request, monkeypatch):
    device = StandIn(request.param)
    monkeypatch.setattr("lightning_qlora.paging.pages.open_pool", device.open_pool)
    return device


@pytest.fixture
def managed(monkeypatch):
    device = StandIn("managed")
    monkeypatch.setattr("lightning_qlora.paging.pages.open_pool", device.open_pool)
    return device


@pytest.fixture
def pinned(monkeypatch):
    device = StandIn("pinned")
    monkeypatch.setattr("lightning_qlora.paging.pages.open_pool", device.open_pool)
    return device
