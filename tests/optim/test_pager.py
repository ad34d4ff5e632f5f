import gc
from collections import defaultdict

import pytest
import torch

from lightning_qlora.optim.adamw import PagedAdamW
from lightning_qlora.optim.pager import Pager
from lightning_qlora.optim.pool import SEGMENT_BYTES
from tests.optim.stand_in import StandIn, assert_all_paged
from tests.optim.test_optimizer_pages import assert_equal_parameters, model, paged_run, train


def test_attaching_twice_changes_nothing(stand_in):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    first = Pager()
    second = Pager()
    first.attach(optimizer)
    state = optimizer.state
    first.attach(optimizer)
    second.attach(optimizer)
    assert optimizer.state is state
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    train(net, optimizer, 2)
    assert len(stand_in.pools) == 1


def test_close_frees_every_page_and_keeps_the_values(stand_in):
    plain = model()
    paged = model()
    reference, optimizer = (torch.optim.AdamW(net.parameters()) for net in (plain, paged))
    pager = Pager()
    pager.attach(optimizer)
    train(plain, reference, 3)
    train(paged, optimizer, 3)
    pager.close()
    gc.collect()
    assert stand_in.nbytes == 0
    train(plain, reference, 3, start=3)
    train(paged, optimizer, 3, start=3)  # on a CPU the state is where the optimizer wants it: it goes on, unpaged
    assert_equal_parameters(plain, paged)
    assert stand_in.nbytes == 0
    pager.attach(optimizer)
    assert_all_paged(stand_in, optimizer)


def test_close_frees_what_an_optimizer_paged_by_itself(stand_in):
    net = model()
    optimizer = PagedAdamW(net.parameters())
    pager = Pager()
    pager.attach(optimizer)
    train(net, optimizer, 2)
    assert_all_paged(stand_in, optimizer)
    pager.close()
    assert stand_in.nbytes == 0


def test_several_optimizers_fetch_only_their_own_state(managed):
    nets = [model(), model()]
    optimizers = [torch.optim.AdamW(net.parameters()) for net in nets]
    pager = Pager()
    for net, optimizer in zip(nets, optimizers, strict=True):
        pager.attach(optimizer)
        train(net, optimizer, 1)
    before = [pool.counts["prefetches"] for pool in managed.pools]
    train(nets[1], optimizers[1], 1)
    after = [pool.counts["prefetches"] for pool in managed.pools]
    assert after[0] == before[0]
    assert after[1] > before[1]


def test_the_report_says_how_and_how_much(stand_in):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    pager = Pager()
    pager.attach(optimizer)
    assert pager.report().tensors == 0
    train(net, optimizer, 1)
    report = pager.report()
    assert report.kind == stand_in.kind
    assert report.tensors == 4
    assert report.nbytes == 2 * 4 * (80 * 96 + 96 * 64)
    assert report.allocated == stand_in.nbytes == SEGMENT_BYTES
    assert "MiB (32.0 MiB allocated)" in str(report)
    assert ("because a stand-in" in str(report)) == (stand_in.kind == "pinned")


def test_on_a_cpu_nothing_is_paged():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    pager = Pager()
    pager.attach(optimizer)
    train(net, optimizer, 1)
    assert type(optimizer.state) is defaultdict
    assert {type(entry) for entry in optimizer.state.values()} == {dict}
    assert pager.report().kind == "plain"
    assert "not paged" in str(pager.report())


def test_state_is_paged_if_the_parameters_move_between_attach_and_the_first_step(monkeypatch):
    """`Pager.attach` and PagedAdamW8bit(model.parameters()) may come before model.to(device)."""
    net, optimizer = paged_run()
    stand_in = StandIn("managed").install(monkeypatch)
    train(net, optimizer, 1)
    assert all(stand_in.owns(entry["exp_avg"]) for param, entry in optimizer.state.items() if param.numel() >= 4096)
    assert stand_in.nbytes


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"not with Linear.*paged_optimizer=False"):
        Pager().attach(torch.nn.Linear(2, 2))
