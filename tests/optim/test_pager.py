import copy
from collections import defaultdict

import pytest
import torch

from lightning_qlora.optim.adamw import PagedAdamW
from lightning_qlora.optim.pager import Pager, PagingReport
from lightning_qlora.optim.pool import SEGMENT_BYTES
from tests.optim.stand_in import StandIn, assert_all_paged
from tests.optim.test_optimizer_pages import assert_equal_parameters, model, paged_run, train


def test_attaching_twice_changes_nothing(stand_in):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    first, second = Pager(), Pager()
    first.attach(optimizer)
    state = optimizer.state
    first.attach(optimizer)
    second.attach(optimizer)
    assert optimizer.state is state
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    train(net, optimizer, 2)
    assert len(stand_in.pools) == 1


@pytest.mark.parametrize("kind", [torch.optim.AdamW, PagedAdamW])
def test_close_frees_every_page_and_keeps_the_values(stand_in, kind):
    """Also the pages of an optimizer that pages itself."""
    plain, paged = model(), model()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer = kind(paged.parameters(), lr=1e-2, weight_decay=0.0)
    pager = Pager()
    pager.attach(optimizer)
    train(plain, reference, 3)
    train(paged, optimizer, 3)
    assert_all_paged(stand_in, optimizer)
    pager.close()
    assert stand_in.nbytes == 0
    train(plain, reference, 3, start=3)
    train(paged, optimizer, 3, start=3)  # on a CPU the state is where the optimizer wants it: it goes on, unpaged
    assert_equal_parameters(plain, paged)
    assert stand_in.nbytes == 0
    assert pager.report().kind == "plain"
    pager.attach(optimizer)
    assert_all_paged(stand_in, optimizer)


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


@pytest.mark.parametrize("min_numel", [4096, 0])
def test_the_report_says_how_and_how_much(stand_in, min_numel):
    """With a limit of 0, also the state of biases is paged, but no step counter and nothing empty."""
    net = model()
    empty = torch.nn.Parameter(torch.zeros(0))
    empty.grad = torch.zeros(0)
    optimizer = torch.optim.AdamW([*net.parameters(), empty])
    pager = Pager(min_numel)
    pager.attach(optimizer)
    nothing = PagingReport("plain", "no state on a GPU", 0, 0, 0)
    assert (pager.report(), copy.deepcopy(pager).report(), copy.copy(pager).min_numel) == (nothing, nothing, min_numel)
    train(net, optimizer, 1)
    biases = 96 + 64 if min_numel == 0 else 0
    nbytes = 2 * 4 * (80 * 96 + 96 * 64 + biases)
    reason, memory = "a stand-in", "pinned memory and copies, because a stand-in"
    if stand_in.kind == "managed":
        reason, memory = "", "CUDA unified memory"
    report = pager.report()
    assert report == PagingReport(stand_in.kind, reason, 8 if biases else 4, nbytes, SEGMENT_BYTES)
    sizes = f"{nbytes / 2**20:.1f} MiB (32.0 MiB allocated)"
    assert str(report) == f"Optimizer state paged: {report.tensors} tensors, {sizes}, through {memory}."
    again = torch.optim.AdamW([*net.parameters(), empty])
    Pager(min_numel).attach(again)
    again.load_state_dict(optimizer.state_dict())
    assert not any(stand_in.owns(state["step"]) for state in again.state.values())


def test_on_a_cpu_nothing_is_paged():
    _, optimizer = paged_run(1)
    assert type(optimizer.state) is defaultdict
    assert {type(entry) for entry in optimizer.state.values()} == {dict}
    pager = Pager()
    pager.attach(optimizer)
    text = "Optimizer state is not paged: it is in host memory already, or does not exist yet."
    assert str(pager.report()) == text


def test_state_is_paged_if_the_parameters_move_between_attach_and_the_first_step(monkeypatch):
    """`Pager.attach` and PagedAdamW(model.parameters()) may come before model.to(device)."""
    net, optimizer = paged_run()
    stand_in = StandIn("managed").install(monkeypatch)
    train(net, optimizer, 1)
    assert all(stand_in.owns(entry["exp_avg"]) for param, entry in optimizer.state.items() if param.numel() >= 4096)
    assert stand_in.nbytes


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"not with Linear.*paged_optimizer=False"):
        Pager().attach(torch.nn.Linear(2, 2))
