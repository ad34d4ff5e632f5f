"""QLoRAPrecision pages the state of its optimizers."""

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric

from lightning_qlora import QLoRAPrecision
from tests.optim.runs import ManualRegression, Regression, data, fit, parameters
from tests.optim.stand_in import StandIn, assert_all_paged


@pytest.fixture
def stand_in(request, monkeypatch):
    return StandIn(request.param).install(monkeypatch)


def plugin(paged):
    # rank 256: the adapters' state is above the size that is paged
    return QLoRAPrecision(r=256, target_modules=["net.0", "net.2"], lora_dropout=0.1, paged_optimizer=paged)


@pytest.mark.parametrize(
    ("stand_in", "kind"), [("managed", Regression), ("pinned", ManualRegression)], indirect=["stand_in"]
)
def test_a_paged_run_equals_an_unpaged_one_and_leaves_nothing(stand_in, kind):
    runs = [kind(), kind(placed=stand_in)]
    for paged, module in enumerate(runs):
        torch.manual_seed(3)
        fit(module, plugins=plugin(bool(paged)))
        assert bool(stand_in.pools) is bool(paged)
    assert torch.equal(*map(parameters, runs))
    assert stand_in.nbytes == 0


@pytest.mark.parametrize("stand_in", ["managed"], indirect=True)
def test_resume_is_bit_equal(stand_in, tmp_path):
    torch.manual_seed(3)
    straight = Regression()
    fit(straight, plugins=plugin("auto"))
    torch.manual_seed(3)
    fit(Regression(), plugins=plugin("auto"), epochs=1, save=tmp_path / "half.ckpt")
    torch.manual_seed(9)
    resumed = Regression(placed=stand_in)
    fit(resumed, plugins=plugin("auto"), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(parameters(straight), parameters(resumed))
    assert stand_in.nbytes == 0


@pytest.mark.parametrize("stand_in", ["managed", "pinned"], indirect=True)
def test_fabric_pages_from_the_first_step(stand_in):
    precision = plugin("auto")
    fabric = Fabric(accelerator="cpu", devices=1, plugins=precision)
    model = fabric.setup_module(Regression())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
    for x, y in data():
        optimizer.zero_grad()
        fabric.backward(F.mse_loss(model.module.net(x), y))
        optimizer.step()
        assert_all_paged(stand_in, optimizer.optimizer)
    assert precision.pager.report().tensors == 8
    precision.teardown()
    assert stand_in.nbytes == 0
