import torch

from lightning_qlora.paging import PagedAdamW8bit, optimizer
from lightning_qlora.paging.windows import windows
from tests.paging.stand_in import assert_all_paged


def test_an_unpaged_optimizer_gets_its_parameters_in_parts():
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (6, 6, 20, 1)]
    parts = list(windows(torch.optim.SGD(params), params, 10))
    assert [[p.numel() for p in part] for part in parts] == [[6, 6], [20], [1]]


def test_no_parameters_no_windows():
    param = torch.nn.Parameter(torch.zeros(1))
    assert list(windows(torch.optim.SGD([param]), [], 10)) == []


def test_double_buffered(pinned, monkeypatch):
    """The next window is on its way before this one is used, and at most two are on the device."""
    monkeypatch.setattr(optimizer, "WINDOW_NUMEL", 4096)
    params = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(4)]
    paged = PagedAdamW8bit(params)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        paged.step()
    assert_all_paged(pinned, paged, least=8)
    transfers = pinned.devices[0]
    transfers.log.clear()
    transfers.on_device = transfers.most_on_device = 0
    paged.step()
    window = ["arrive", "fetch 2", "store 2"]
    assert transfers.log == ["fetch 2", *window * 3, "arrive", "store 2", "store 0"]
    assert transfers.most_on_device == 2 * 2 * 4096, "two windows of two one-byte moments"
