import pytest
from stand_in import StandIn


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
