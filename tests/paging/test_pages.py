"""When the state of one optimizer moves, with plain torch loops."""

import copy
import gc

import pytest
import torch

from lightning_qlora.paging.pager import Pager
from tests.paging.stand_in import assert_all_paged


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(80, 96), torch.nn.ReLU(), torch.nn.Linear(96, 64))


def train(net, optimizer, steps, start=0, use_closure=False):
    for step in range(start, start + steps):
        x = torch.randn(8, 80, generator=torch.Generator().manual_seed(step))

        def closure(x=x):
            optimizer.zero_grad()
            loss = net(x).pow(2).mean()
            loss.backward()
            return loss

        if use_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


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


def assert_equal_parameters(a, b):
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(left, right)


CASES = [(name, use_closure) for name in OPTIMIZERS for use_closure in (False, True) if use_closure or name != "LBFGS"]


@pytest.mark.parametrize(("name", "use_closure"), CASES)
def test_paged_equals_unpaged(stand_in, name, use_closure):
    plain, paged = model(), model()
    optimizers = [OPTIMIZERS[name](net.parameters()) for net in (plain, paged)]
    Pager().attach(optimizers[1])
    for net, optimizer in zip((plain, paged), optimizers, strict=True):
        train(net, optimizer, 5 if name == "LBFGS" else 20, use_closure=use_closure)
    assert_equal_parameters(plain, paged)
    assert_all_paged(stand_in, optimizers[1])


class Odd(torch.optim.Optimizer):
    """Lion by somebody else: a list of tensors, a 0-d tensor, None, a tensor that is filled after it was set."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
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
        return loss


def test_an_odd_optimizer_trains_and_resumes(stand_in):
    plain, paged = model(), model()
    reference, optimizer = Odd(plain.parameters()), Odd(paged.parameters())
    Pager().attach(optimizer)
    train(plain, reference, 20)
    train(paged, optimizer, 10)
    assert_all_paged(stand_in, optimizer, least=6)

    saved = copy.deepcopy((paged.state_dict(), optimizer.state_dict()))
    assert saved[1]["state"][0]["nothing"] is None
    again = model()
    again.load_state_dict(saved[0])
    resumed = Odd(again.parameters())
    Pager().attach(resumed)
    resumed.load_state_dict(saved[1])
    assert_all_paged(stand_in, resumed, least=2)
    train(again, resumed, 10, start=10)
    assert_equal_parameters(plain, again)


def test_the_closure_runs_before_the_state_is_fetched(managed):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    Pager().attach(optimizer)
    train(net, optimizer, 1)
    log = managed.devices[0].log
    log.clear()
    optimizer.step(lambda: log.append("forward and backward"))
    assert log[0] == "forward and backward"
    assert set(log[1:]) == {"prefetch"}


def test_a_prefetched_step_never_faults(managed):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    Pager().attach(optimizer)
    train(net, optimizer, 1)
    memory = managed.devices[0]
    for step in range(3):
        memory.evict()  # forward and backward of a long sequence
        train(net, optimizer, 1, start=step)
        for state in optimizer.state.values():
            for tensor in (state["exp_avg"], state["exp_avg_sq"]):
                if managed.owns(tensor):
                    memory.touch(tensor)
        assert memory.faults == 0
    assert memory.prefetches == 3, "four tensors side by side go in one call, three steps"


def test_pinned_state_rests_on_the_host(pinned):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    Pager().attach(optimizer)
    train(net, optimizer, 3)
    transfers = pinned.devices[0]
    assert transfers.on_device <= 0
    assert not transfers.pending, "what the CPU can read must have arrived"
    assert [entry for entry in transfers.log if entry.startswith("fetch")][-2:] == ["fetch 4", "fetch 4"]


def test_existing_state_is_paged_when_attached(stand_in):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    train(net, optimizer, 2)
    Pager().attach(optimizer)
    assert_all_paged(stand_in, optimizer, least=4)


def test_pages_are_freed_with_the_optimizer(stand_in):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    Pager().attach(optimizer)
    train(net, optimizer, 2)
    assert stand_in.nbytes > 0
    del optimizer
    gc.collect()
    assert stand_in.nbytes == 0


def test_a_checkpoint_knows_nothing_of_paging(stand_in, tmp_path):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    Pager().attach(optimizer)
    train(net, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert type(loaded["state"][0]) is dict
    size = sum(t.numel() * 4 for state in loaded["state"].values() for t in state.values())
    assert (tmp_path / "optimizer.pt").stat().st_size < size + 8192, "a segment must not be saved with its tensors"
    plain = torch.optim.AdamW(model().parameters())
    plain.load_state_dict(loaded)
    train(net, plain, 1)


def test_no_tensor_is_on_the_device_twice_while_loading(pinned):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    Pager().attach(optimizer)
    train(net, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = torch.optim.AdamW(net.parameters())
    Pager().attach(fresh)
    fresh.load_state_dict(saved)
    assert pinned.devices[-1].most_on_device == 0
    for state, old in zip(fresh.state.values(), saved["state"].values(), strict=True):
        assert all(torch.equal(state[key], old[key]) for key in old)


def test_a_bf16_parameter_loads_its_state_in_bf16_as_torch_does(stand_in):
    param = torch.nn.Parameter(torch.randn(64, 64, dtype=torch.bfloat16))
    param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW([param])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].float()
    paged = torch.optim.AdamW([param])
    Pager().attach(paged)
    paged.load_state_dict(saved)
    assert paged.state[param]["exp_avg"].dtype == torch.bfloat16


def test_loading_the_wrong_state_fails_as_in_torch(stand_in):
    optimizer = torch.optim.AdamW(model().parameters())
    Pager().attach(optimizer)
    other = torch.optim.AdamW(torch.nn.Linear(4, 4).parameters())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(other.state_dict())


def test_state_that_shares_the_parameters_memory_stays(stand_in):
    param = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = torch.optim.AdamW([param])
    Pager().attach(optimizer)
    optimizer.state[param]["alias"] = param.data
    optimizer.state[param]["the parameter"] = param
    optimizer.state[param]["row"] = torch.zeros(2, 8192)[0]
    assert stand_in.nbytes == 0
    assert optimizer.state[param]["alias"].data_ptr() == param.data_ptr()


def test_channels_last_state_keeps_its_strides(stand_in):
    conv = torch.nn.Conv2d(16, 64, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(conv.parameters())
    Pager().attach(optimizer)
    conv(torch.randn(1, 16, 8, 8)).sum().backward()
    optimizer.step()
    state = optimizer.state[conv.weight]["exp_avg"]
    assert stand_in.owns(state)
    assert state.stride() == conv.weight.stride()


def test_a_refused_allocation_says_what_to_do(stand_in):
    stand_in.budget = 1000
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    Pager().attach(optimizer)
    with pytest.raises(MemoryError, match=r"MiB of (managed|pinned) memory were asked for and refused") as error:
        train(net, optimizer, 1)
    for advice in ("PagedAdamW8bit", "paged_optimizer=False", "ckpt_path"):
        assert advice in str(error.value)
    assert stand_in.nbytes == 0


def test_an_optimizer_with_its_own_load_state_dict_is_paged_again(stand_in):
    class Own(torch.optim.AdamW):
        def load_state_dict(self, state_dict):
            self.__setstate__({"state": {p: dict(s) for p, s in state_dict.items()}})

    net = model()
    optimizer = Own(net.parameters())
    Pager().attach(optimizer)
    train(net, optimizer, 1)
    optimizer.load_state_dict({p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()})
    train(net, optimizer, 1)
    assert_all_paged(stand_in, optimizer)
