"""When the state of one optimizer moves, with plain torch loops; which pool a device gets."""

import copy

import pytest
import torch
from torch import nn

from lightning_qlora.optim import optimizer_pages
from lightning_qlora.optim.host_memory import ManagedPool, PinnedPool
from lightning_qlora.optim.optimizer_pages import open_pool
from lightning_qlora.optim.pager import Pager
from tests.optim.stand_in import assert_all_paged
from tests.toys import assert_equal


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 96), nn.ReLU(), nn.Linear(96, 64))


def backward(net, optimizer, step):
    """The forward and backward pass of a step; its loss."""
    optimizer.zero_grad()
    x = torch.randn(8, 80, generator=torch.Generator().manual_seed(step))
    loss = net(x.to(net[0].weight.device)).pow(2).mean()
    loss.backward()
    return loss


def train(net, optimizer, steps, start=0, use_closure=False):
    for step in range(start, start + steps):
        losses = []

        def closure(step=step, losses=losses):
            losses.append(backward(net, optimizer, step))
            return losses[-1]

        if use_closure:
            assert optimizer.step(closure) is losses[0]
        else:
            closure()
            assert optimizer.step() is None


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.5),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.5, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=1e-2, history_size=3),
}


def attached(optimizer):
    """The optimizer, whose state a Pager moves from now on."""
    Pager().attach(optimizer)
    return optimizer


def paged_run(steps=0):
    """A model and its AdamW with a Pager, after some steps."""
    net = model()
    optimizer = attached(torch.optim.AdamW(net.parameters()))
    train(net, optimizer, steps)
    return net, optimizer


def assert_equal_parameters(a, b):
    assert_equal([*a.parameters()], [*b.parameters()])


@pytest.mark.parametrize(("name", "use_closure"), [(name, i % 2 == 1) for i, name in enumerate(OPTIMIZERS)])
def test_paged_equals_unpaged(stand_in, name, use_closure):
    plain, paged = model(), model()
    optimizers = [OPTIMIZERS[name](net.parameters()) for net in (plain, paged)]
    attached(optimizers[1])
    for net, optimizer in zip((plain, paged), optimizers, strict=True):
        train(net, optimizer, 3 if name == "LBFGS" else 6, use_closure=use_closure)
    assert_equal_parameters(plain, paged)
    assert_all_paged(stand_in, optimizers[1])


class Odd(torch.optim.Optimizer):
    """Lion by somebody else: lists, None, a 0-d tensor, one that is filled after it was set, a counter of its own."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        self.state["steps"] = [self.state.get("steps", [0])[0] + 1]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = momentum = torch.zeros_like(p)
                    momentum.add_(p.grad)  # through its own reference, after the state has it
                    state["history"], state["norm"], state["nothing"] = [], torch.zeros(()), None
                state["history"] = [p.grad.clone(), *state["history"]][:2]
                state["momentum"].lerp_(p.grad, 0.1)
                state["norm"] += p.grad.norm()
                average = sum(state["history"]) / len(state["history"])
                p.add_(torch.sign(state["momentum"] + average) + state["norm"] * 1e-3, alpha=-group["lr"])


def test_an_odd_optimizer_trains_and_resumes(stand_in):
    plain, paged = model(), model()
    reference = Odd(plain.parameters())
    optimizer = attached(Odd(paged.parameters()))
    train(plain, reference, 6)
    train(paged, optimizer, 3)
    assert_all_paged(stand_in, optimizer, least=6)

    saved = copy.deepcopy((paged.state_dict(), optimizer.state_dict()))
    assert saved[1]["state"][0]["nothing"] is None and saved[1]["state"]["steps"] == [3]
    assert {type(state) for state in saved[1]["state"].values()} == {dict, list}
    again = model()
    again.load_state_dict(saved[0])
    resumed = attached(Odd(again.parameters()))
    resumed.load_state_dict(saved[1])
    assert_all_paged(stand_in, resumed, least=2)
    train(again, resumed, 3, start=3)
    assert_equal_parameters(plain, again)
    assert resumed.state["steps"] == [6]


def test_the_closure_runs_before_the_state_is_fetched(managed):
    _, optimizer = paged_run(1)
    log = managed.pools[0].log
    log.clear()
    optimizer.step(lambda: log.append("forward and backward"))
    assert log == ["forward and backward", "prefetch"]


def test_a_prefetched_step_never_faults(managed):
    net, optimizer = paged_run(1)
    pool = managed.pools[0]
    for step in range(3):
        pool.driver_evicts()  # forward and backward of a long sequence
        train(net, optimizer, 1, start=step)
        for state in optimizer.state.values():
            for tensor in (state["exp_avg"], state["exp_avg_sq"]):
                if managed.owns(tensor):
                    pool.touch(tensor)
        assert pool.counts["faults"] == 0
    assert pool.counts["prefetches"] == 3, "four tensors side by side go in one call, three steps"


def test_pinned_state_is_on_the_host_between_steps_and_the_cpu_waits_only_to_read_it(pinned):
    _, optimizer = paged_run(3)
    pool = pinned.pools[0]
    assert optimizer.state and pool.on_device <= 0
    assert [entry for entry in pool.log if entry.startswith("fetch")] == ["fetch 4", "fetch 4"]
    assert pool.counts["synchronizations"] == 0, "three steps, and the CPU has waited for no copy"
    assert pool.to_host


READS = {
    "item": lambda optimizer, param: optimizer.state[param]["exp_avg"],
    "dict": lambda optimizer, param: dict(dict(optimizer.state)[param])["exp_avg"],
    "state_dict": lambda optimizer, param: optimizer.state_dict()["state"][0]["exp_avg"],
    "deepcopy": lambda optimizer, param: next(iter(copy.deepcopy(optimizer).state.values()))["exp_avg"],
}


@pytest.mark.parametrize("read", READS)
def test_reading_pinned_state_waits_for_its_copies(pinned, read):
    """All ways to read are in test_paged_state.py."""
    plain = model()
    reference = torch.optim.AdamW(plain.parameters())
    train(plain, reference, 3)
    paged, optimizer = paged_run(3)
    expected = reference.state[next(plain.parameters())]["exp_avg"]
    assert pinned.pools[0].to_host
    assert torch.equal(READS[read](optimizer, next(paged.parameters())), expected)


def test_an_entry_that_was_read_before_the_step_waits_too(pinned):
    net, optimizer = paged_run(1)
    entry = optimizer.state[next(net.parameters())]
    train(net, optimizer, 1)
    assert entry["exp_avg"].isfinite().all()


def test_after_a_step_that_raised_the_state_can_be_saved(pinned):
    net, optimizer = paged_run(1)
    saved = copy.deepcopy(optimizer.state_dict())
    for param in net.parameters():
        param.grad = torch.zeros_like(param)
    net[2].weight.grad = torch.zeros(64, 96).to_sparse()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sparse gradients"):
            optimizer.step()
        assert_equal(optimizer.state_dict()["state"], saved["state"])
    net[2].weight.grad = None
    moments = []
    optimizer.step(lambda: moments.append(optimizer.state[net[0].weight]["exp_avg"].clone()))
    assert torch.equal(moments[0], saved["state"][0]["exp_avg"]), "the closure of the next step reads the state"


def test_pages_are_freed_with_the_optimizer(stand_in):
    _, optimizer = paged_run(2)
    assert stand_in.nbytes > 0
    del optimizer
    assert stand_in.nbytes == 0


def test_a_checkpoint_knows_nothing_of_paging(stand_in, tmp_path):
    net, optimizer = paged_run(2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert type(loaded["state"][0]) is dict
    size = sum(t.numel() * 4 for state in loaded["state"].values() for t in state.values())
    assert (tmp_path / "optimizer.pt").stat().st_size < size + 8192, "a segment must not be saved with its tensors"
    plain = torch.optim.AdamW(model().parameters())
    plain.load_state_dict(loaded)
    train(net, plain, 1)


def test_no_tensor_is_on_the_device_twice_while_loading(pinned):
    net, optimizer = paged_run(2)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = attached(torch.optim.AdamW(net.parameters()))
    fresh.load_state_dict(saved)
    assert pinned.pools[-1].most_on_device == 0
    for state, old in zip(fresh.state.values(), saved["state"].values(), strict=True):
        assert_equal(dict(state), old)


def test_loading_the_wrong_state_fails_as_in_torch(stand_in):
    nets = [model(), nn.Sequential(*model()[:2])]
    optimizers = [attached(torch.optim.AdamW(net.parameters())) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 1)
    for optimizer, other in (optimizers, optimizers[::-1]):
        with pytest.raises(ValueError, match="doesn't match the size"):
            optimizer.load_state_dict(other.state_dict())


def test_state_that_shares_the_parameters_memory_stays(stand_in):
    param = nn.Parameter(torch.randn(64, 64))
    optimizer = attached(torch.optim.AdamW([param]))
    optimizer.state[param]["alias"] = param.data
    optimizer.state[param]["the parameter"] = param
    optimizer.state[param]["row"] = torch.zeros(2, 8192)[0]
    optimizer.state[param]["sparse"] = torch.eye(64).to_sparse()
    assert stand_in.nbytes == 0
    assert optimizer.state[param]["alias"].data_ptr() == param.data_ptr()


def test_channels_last_state_keeps_its_strides(stand_in):
    conv = nn.Conv2d(16, 64, 3).to(memory_format=torch.channels_last)
    optimizer = attached(torch.optim.AdamW(conv.parameters()))
    conv(torch.randn(1, 16, 8, 8)).sum().backward()
    optimizer.step()
    state = optimizer.state[conv.weight]["exp_avg"]
    assert stand_in.owns(state)
    assert state.stride() == conv.weight.stride()


def test_a_refused_allocation_says_what_to_do(stand_in):
    stand_in.budget = 1000
    net, optimizer = paged_run()
    with pytest.raises(MemoryError, match=r"MiB of (managed|pinned) memory were requested and refused") as error:
        train(net, optimizer, 1)
    for advice in ("torchao.optim.AdamW8bit", "paged_optimizer=False", "ckpt_path"):
        assert advice in str(error.value)
    assert stand_in.nbytes == 0


def test_an_optimizer_with_its_own_load_state_dict_is_paged_again(stand_in):
    class Own(torch.optim.AdamW):
        def load_state_dict(self, state_dict):
            self.__setstate__({"state": {p: dict(s) for p, s in state_dict.items()}})

    net = model()
    optimizer = attached(Own(net.parameters()))
    train(net, optimizer, 1)
    optimizer.load_state_dict({p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()})
    train(net, optimizer, 1)
    assert_all_paged(stand_in, optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_state_may_be_a_part_of_a_larger_tensor_and_gets_the_type_of_its_parameter(stand_in, dtype):
    param = nn.Parameter(torch.randn(64, 64, dtype=dtype))
    state = {"step": torch.tensor(1.0), "exp_avg": torch.randn(64, 128)[:, ::2], "exp_avg_sq": torch.ones(1, 64)}
    state["exp_avg_sq"] = state["exp_avg_sq"].expand(64, 64)
    state["sparse"] = torch.eye(64).to_sparse()
    optimizer = attached(torch.optim.AdamW([param]))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
    for key in ("exp_avg", "exp_avg_sq"):
        assert_equal(optimizer.state[param][key], state[key].to(dtype))
        assert stand_in.owns(optimizer.state[param][key])
    assert optimizer.state[param]["sparse"].is_sparse


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_under_another_default_device_state_is_where_its_parameter_is(stand_in, kind):
    """Lightning calls configure_model and Fabric init_module within `with device:`; here it is "meta"."""
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    plain, paged = model(), model()
    reference = kind(plain.parameters(), lr=1e-2, **options)
    train(plain, reference, 3)
    with torch.device("meta"):
        optimizer = attached(kind(paged.parameters(), lr=1e-2, **options))
    for step in range(2):
        backward(paged, optimizer, step)
        with torch.device("meta"):
            optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.device("meta"):
        resumed = attached(kind(paged.parameters(), lr=1e-2, **options))
        resumed.load_state_dict(saved)
    backward(paged, resumed, 2)
    with torch.device("meta"):
        resumed.step()
        state = [tensor for values in resumed.state.values() for tensor in values.values() if tensor is not None]
    assert {tensor.device.type for tensor in state} == {"cpu"}
    assert_all_paged(stand_in, resumed, least=2)
    assert_equal_parameters(plain, paged)


def test_a_device_gets_unified_memory_where_it_pages_else_pinned_memory_and_a_line_in_the_log(monkeypatch):
    log = []
    monkeypatch.setattr(optimizer_pages, "rank_zero_info", log.append)
    monkeypatch.setattr(ManagedPool, "__init__", lambda self, device: setattr(self, "reason", ""))
    monkeypatch.setattr(PinnedPool, "__init__", lambda self, device, reason: setattr(self, "reason", reason))
    assert open_pool(torch.device("cpu")) is None
    for reason, kind in ((None, ManagedPool), ("it is WSL", PinnedPool)):
        monkeypatch.setattr(optimizer_pages, "why_not_managed", lambda device, reason=reason: reason)
        pool = open_pool(torch.device("cuda", 0))
        assert type(pool) is kind
        assert (pool.kind, pool.reason) == (("managed", "") if reason is None else ("pinned", reason))
    assert log == ["Optimizer state on cuda:0 is paged through pinned memory and explicit copies: it is WSL."]
