import pytest
import torch

from tests.optim.stand_in import StandIn


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["managed", "pinned"])
def stand_in(request, monkeypatch):
    return StandIn(request.param).install(monkeypatch)


@pytest.fixture
def managed(monkeypatch):
    return StandIn("managed").install(monkeypatch)


@pytest.fixture
def pinned(monkeypatch):
    return StandIn("pinned").install(monkeypatch)
