import pytest

from tests.optim.stand_in import StandIn


@pytest.fixture(params=["managed", "pinned"])
def stand_in(request, monkeypatch):
    return StandIn(request.param).install(monkeypatch)


@pytest.fixture
def managed(monkeypatch):
    return StandIn("managed").install(monkeypatch)


@pytest.fixture
def pinned(monkeypatch):
    return StandIn("pinned").install(monkeypatch)
