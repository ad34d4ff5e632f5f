import copy
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_qlora.kernels.adamw import dequantize_state, quantize_state
from lightning_qlora.optim import adamw8bit
from lightning_qlora.optim.adamw import PagedAdamW
from lightning_qlora.optim.adamw8bit import PagedAdamW8bit
from lightning_qlora.optim.state_8bit import MOMENTS, to_32bit
from tests.optim.stand_in import assert_all_paged
from tests.optim.test_optimizer_pages import assert_equal_parameters, attached, model, train
from tests.toys import assert_equal


def regression_loss(make_optimizer):
    """First loss of a small network on a noisy regression, and the average of the last 20 of 100 steps."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64))
    target = torch.nn.Linear(64, 64)
    optimizer = make_optimizer(net.parameters())
    losses = []
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(64, 64, generator=generator)
        with torch.no_grad():
            y = target(x).sin() + 0.1 * torch.randn(64, 64, generator=generator)
        loss = torch.nn.functional.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-20:]) / 20


def test_8bit_learns_as_well_as_32bit_and_as_bitsandbytes():
    first, adamw = regression_loss(lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01))
    assert adamw < first / 3, "it must have learnt something"
    _, ours = regression_loss(lambda params: PagedAdamW8bit(params, lr=2e-3, weight_decay=0.01))
    assert abs(ours / adamw - 1) < 0.02
    bnb = pytest.importorskip("bitsandbytes")
    _, theirs = regression_loss(lambda params: bnb.optim.AdamW8bit(params, lr=2e-3, weight_decay=0.01))
    assert abs(ours / theirs - 1) < 0.02


EXPONENTS = st.floats(-30, 30)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(EXPONENTS, EXPONENTS, st.floats(0, 1)), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 100),
)
def test_no_8bit_step_is_longer_than_the_learning_rate_whatever_the_spread(steps, weight_decay, seed):
    """Gradients differ in spread and share of zeros from step to step; torch's AdamW makes steps of up to 7."""
    generator = torch.Generator().manual_seed(seed)
    param = torch.nn.Parameter(torch.randn(4200, generator=generator))
    optimizer = PagedAdamW8bit([param], lr=1e-2, weight_decay=weight_decay)
    for low, high, zeros in steps:
        exponents = low + (high - low) * torch.rand(4200, generator=generator)
        grad = 10**exponents * torch.randn(4200, generator=generator).sign()
        param.grad = grad * (torch.rand(4200, generator=generator) >= zeros)
        before = param.detach() * (1 - 1e-2 * weight_decay)
        optimizer.step()
        assert (param.detach() - before).abs().max() < 1.001e-2


@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
def test_small_steps_arrive(kind):
    """A hundred steps of 1e-6 on numbers of 1: their share beside torch's AdamW in float64."""
    start = torch.randn(5000)
    params = [torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.double())]
    optimizers = [kind(params[:1], lr=1e-6), torch.optim.AdamW(params[1:], lr=1e-6, weight_decay=0.0)]
    for _ in range(100):
        grad = torch.randn(5000) + 0.5
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.to(param.dtype)
            optimizer.step()
    got, want = (param.detach().double() - start.double() for param in params)
    assert abs((got * want).sum() / want.square().sum() - 1) < 0.02


def test_gradients_that_get_small_beside_a_large_one_make_no_long_steps():
    """The second moment of the small ones has code 0, and their first has not; without a bound steps of 9,859."""
    param = torch.nn.Parameter(torch.zeros(4096))
    optimizer = PagedAdamW8bit([param], lr=1e-3)
    for small in (3e-4, 3e-6, 0.0):
        before = param.detach().clone()
        param.grad = torch.full((4096,), small)
        param.grad[::256] = 1.0
        optimizer.step()
        assert 0.5 < (param.detach() - before)[1].abs() / 1e-3 < 1.001


def test_state_takes_a_quarter_and_that_of_small_tensors_is_in_32_bits():
    params = [torch.nn.Parameter(torch.randn(n)) for n in (4095, 4096, 5000)]
    optimizer = PagedAdamW8bit(params)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    sizes = [{key: (value.dtype, value.numel()) for key, value in optimizer.state[param].items()} for param in params]
    small = {"step": (torch.float32, 1)} | dict.fromkeys(MOMENTS, (torch.float32, 4095))
    assert sizes[0] == small
    for size, numel, blocks in zip(sizes[1:], (4096, 5000), (16, 20), strict=True):
        codes = {f"{name}_codes": (torch.uint8, numel) for name in MOMENTS}
        scales = {f"{name}_absmax": (torch.float32, blocks) for name in MOMENTS}
        assert size == {"step": (torch.float32, 1)} | codes | scales


@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
def test_paged_equals_unpaged_by_itself(stand_in, kind):
    paged = model()
    optimizer = kind(paged.parameters(), lr=1e-2)
    train(paged, optimizer, 6)
    assert_all_paged(stand_in, optimizer, least=4)
    plain = model()
    if kind is PagedAdamW:
        reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0)
    else:
        reference = PagedAdamW8bit(plain.parameters(), lr=1e-2, paged=False)
    train(plain, reference, 6)
    assert_equal_parameters(plain, paged)


@pytest.mark.parametrize(("source", "target"), [(True, False), (False, True), (True, True)])
def test_state_round_trips_exactly_between_paged_and_unpaged(stand_in, source, target, tmp_path):
    net = model()
    net[0].bfloat16()
    optimizer = PagedAdamW8bit(net.parameters(), lr=1e-2, paged=source)
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = PagedAdamW8bit(copy.deepcopy(net).parameters(), lr=1e-2, paged=target)
    other.load_state_dict(saved)
    again = other.state_dict()
    assert again["param_groups"] == saved["param_groups"]
    assert_equal(again["state"], saved["state"])
    if target:
        assert_all_paged(stand_in, other, least=4)


def test_32bit_state_of_adamw_loads_and_stays():
    net = model()
    adamw = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    train(net, adamw, 5)
    other = copy.deepcopy(net)
    optimizer = PagedAdamW8bit(other.parameters(), lr=1e-2)
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    train(net, adamw, 5, start=5)
    train(other, optimizer, 5, start=5)
    for left, right in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def trained_in_8bit():
    """A model after five steps of PagedAdamW8bit, and the optimizer's state dict."""
    net = model()
    optimizer = PagedAdamW8bit(net.parameters(), lr=1e-2)
    for step in range(5):
        for param in net.parameters():
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    return net, copy.deepcopy(optimizer.state_dict())


def decoded(state):
    if "exp_avg" in state:
        return state["exp_avg"], state["exp_avg_sq"]
    return (
        dequantize_state(state["exp_avg_codes"], state["exp_avg_absmax"], signed=True),
        dequantize_state(state["exp_avg_sq_codes"], state["exp_avg_sq_absmax"], signed=False),
    )


def paged_adamw(params, lr):
    return attached(torch.optim.AdamW(params, lr=lr, weight_decay=0.0))


@pytest.mark.parametrize("kind", [PagedAdamW, paged_adamw])
def test_8bit_state_loads_decoded_into_a_paged_adamw_and_the_run_goes_on(stand_in, kind):
    net, saved = trained_in_8bit()
    by_hand = copy.deepcopy(net)
    reference = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer = kind(net.parameters(), lr=1e-2)
    optimizer.load_state_dict(saved)
    for param, copied, state in zip(net.parameters(), by_hand.parameters(), saved["state"].values(), strict=True):
        m, v = (moment.clone() for moment in decoded(state))
        expected = {"step": torch.tensor(5.0), "exp_avg": m, "exp_avg_sq": v}
        assert_equal(dict(optimizer.state[param]), expected)
        reference.state[copied] = expected
    assert_all_paged(stand_in, optimizer, least=4)
    train(net, optimizer, 3)
    train(by_hand, reference, 3)
    assert_equal_parameters(by_hand, net)


def test_a_second_moment_with_code_0_is_decoded_to_a_step_of_one_learning_rate():
    m = torch.tensor([1e-3, 2.0, 1e25]).repeat_interleave(256)
    codes = torch.zeros(768, dtype=torch.uint8)
    state = {"step": torch.tensor(2.0), "exp_avg_codes": codes.clone(), "exp_avg_absmax": torch.zeros(3)}
    quantize_state(m, state["exp_avg_codes"], state["exp_avg_absmax"], signed=True)
    state |= {"exp_avg_sq_codes": codes, "exp_avg_sq_absmax": torch.ones(3)}
    before = dict(state)
    in_32bit = to_32bit(state, (0.9, 0.999))
    assert state == before and in_32bit.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(in_32bit["exp_avg"], m)
    v = ((1 - 0.999**2) * (m.double() / (1 - 0.9**2)).square()).clamp(max=torch.finfo(torch.float32).max)
    torch.testing.assert_close(in_32bit["exp_avg_sq"].double(), v, rtol=1e-5, atol=0.0)


def test_an_adamw_that_is_not_paged_does_not_train_on_codes():
    net, saved = trained_in_8bit()
    for foreach in (True, False):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, foreach=foreach)
        optimizer.load_state_dict(saved)
        with pytest.raises(KeyError, match="exp_avg"):
            train(net, optimizer, 1)


@pytest.mark.parametrize(("rows", "columns", "shards"), [(5, 1000, 2), (48, 300, 2), (48, 300, 3), (4, 2000, 3)])
def test_gathered_shards_are_decoded_and_quantized_again_for_one_device(rows, columns, shards):
    """Blocks do not cross shards. All shards have the scales of the largest one; the last may have no rows."""
    whole = {"exp_avg": torch.randn(rows, columns), "exp_avg_sq": torch.rand(rows, columns)}
    state = {"step": torch.tensor(7.0), "shards": torch.tensor(shards)}
    for name, value in whole.items():
        codes = torch.zeros(rows, columns, dtype=torch.uint8)
        absmax = torch.zeros(shards, -(-(-(-rows // shards) * columns) // 256))
        for part, of_part, scales in zip(value.chunk(shards), codes.chunk(shards), absmax, strict=False):
            quantize_state(part, of_part, scales[: -(-part.numel() // 256)], signed=name == "exp_avg")
        state |= {f"{name}_codes": codes, f"{name}_absmax": absmax.view(-1)}
    optimizer = PagedAdamW8bit([torch.nn.Parameter(torch.randn(rows, columns))])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: dict(state)}})
    (loaded,) = optimizer.state.values()
    assert loaded["step"] == 7 and "shards" not in loaded
    for saved in (state, loaded):
        for name, value in to_32bit(dict(saved), (0.9, 0.999)).items():
            if name != "step":
                assert value.sub(whole[name]).norm() < 0.02 * whole[name].norm()


@pytest.mark.parametrize(
    ("mesh", "placements", "part", "shards"),
    [
        ((2,), [Shard(0)], (slice(32), slice(None)), 2),
        ((2, 2), [Replicate(), Shard(0)], (slice(32), slice(None)), 2),
        ((2,), [Replicate()], (slice(None), slice(None)), 1),
        ((2,), [Shard(1)], (slice(None), slice(64)), 0),
        ((2, 2), [Shard(0), Shard(1)], (slice(32), slice(64)), 0),
    ],
)
def test_state_of_rank_0_of_a_sharded_parameter(mesh, placements, part, shards):
    whole = torch.nn.Parameter(torch.randn(64, 128))
    reference = PagedAdamW8bit([whole])
    whole.grad = torch.randn(64, 128)
    reference.step()
    saved = copy.deepcopy(reference.state_dict())
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=math.prod(mesh))
    try:
        devices = init_device_mesh("cpu", mesh)
        local, grad = (DTensor.from_local(t.detach()[part].clone(), devices, placements) for t in (whole, whole.grad))
        param = torch.nn.Parameter(local)
        param.grad = grad
        optimizer = PagedAdamW8bit([param])
        optimizer.load_state_dict(saved)
        loaded = tree_map_only(DTensor, DTensor.to_local, dict(optimizer.state[param]))
        assert loaded.pop("step") == 1
        assert loaded.pop("shards", 1) == max(shards, 1)
        keys = {f"{name}_{part}" for name in MOMENTS for part in ("codes", "absmax")} if shards else set(MOMENTS)
        assert loaded.keys() == keys
        expected = saved["state"][0] if shards else to_32bit(saved["state"][0], (0.9, 0.999))
        for ours, theirs in zip(decoded(loaded), decoded(expected), strict=True):
            tolerance = 0.01 if shards == 2 else 0.0  # quantized twice
            assert ours.sub(theirs[part]).norm() <= tolerance * theirs.norm()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(param.to_local(), whole[part], atol=5e-5, rtol=0.0)  # a step is 2e-4
    finally:
        torch.distributed.destroy_process_group()


def test_loading_does_not_share_memory_with_the_state_dict():
    _, saved = trained_in_8bit()
    before = copy.deepcopy(saved)
    net = model()
    other = PagedAdamW8bit(net.parameters())
    other.load_state_dict(saved)
    train(net, other, 1)
    assert_equal(saved["state"], before["state"])


def test_a_deep_copy_trains_on_by_itself(stand_in):
    net = model()
    optimizer = PagedAdamW8bit(net.parameters(), lr=1e-2)
    train(net, optimizer, 2)
    twin_net, twin = copy.deepcopy((net, optimizer))
    train(net, optimizer, 2, start=2)
    train(twin_net, twin, 2, start=2)
    assert_equal_parameters(net, twin_net)


@pytest.mark.parametrize(
    ("name", "value", "error", "found"),
    [
        ("lr", "x", TypeError, "lr='x'"),
        ("lr", None, TypeError, "lr=None"),
        ("lr", True, TypeError, "lr=True"),
        ("lr", -1e-30, ValueError, "lr=-1e-30"),
        ("lr", torch.ones(2), TypeError, "lr=tensor([1., 1.])"),
        ("eps", "1e-8", TypeError, "eps='1e-8'"),
        ("eps", -1e-8, ValueError, "eps=-1e-08"),
        ("weight_decay", [0.1], TypeError, "weight_decay=[0.1]"),
        ("weight_decay", float("nan"), ValueError, "weight_decay=nan"),
        ("betas", 0.9, TypeError, "betas=0.9"),
        ("betas", ("0.9", "0.999"), TypeError, "betas[0]='0.9'"),
        ("betas", (0.9,), ValueError, "betas=(0.9,)"),
        ("betas", (0.9, 0.99, 0.999), ValueError, "betas=(0.9, 0.99, 0.999)"),
        ("betas", (0.9, 1.0), ValueError, "betas[1]=1.0"),
        ("betas", (-1e-30, 0.9), ValueError, "betas[0]=-1e-30"),
        ("paged", "no", TypeError, "paged='no'"),
    ],
)
def test_what_is_no_number_of_its_range_is_refused(name, value, error, found):
    message = rf"^{re.escape(found)}: must be (a number|a finite number|two numbers|True or False)"
    param = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(error, match=message):
        PagedAdamW8bit([param], **{name: value})
    if name != "paged":
        with pytest.raises(error, match=message):
            PagedAdamW8bit([{"params": [param], name: value}])


def test_numbers_may_be_tensors_and_betas_a_list(monkeypatch):
    """The kernels of a GPU get floats: Triton would take a tensor as an address."""
    given = []
    step = adamw8bit.adamw_step
    monkeypatch.setattr(adamw8bit, "adamw_step", lambda *args: given.append(args[-1]) or step(*args))
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    lr, beta, eps, weight_decay = torch.tensor([0.1, 0.9, 1e-8, 0.0])
    PagedAdamW8bit([param], lr=lr, betas=[beta, 0.99], eps=eps, weight_decay=weight_decay).step()
    assert torch.allclose(param.detach(), torch.full((2,), 0.9))
    assert all(type(number) is float for name, number in vars(given[0]).items() if name != "step")


def test_what_it_cannot_train_is_refused():
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match="float64"):
        PagedAdamW8bit([param]).step()
    embedding = torch.nn.Embedding(100, 64, sparse=True)
    optimizer = PagedAdamW8bit(embedding.parameters())
    embedding.weight.grad = torch.ones(100, 64)
    optimizer.step()
    optimizer.zero_grad()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"sparse gradient.*SparseAdam"):
        optimizer.step()
    assert optimizer.state[embedding.weight]["step"] == 1
    for rows in (1, 64):  # state in 32 and in 8 bits
        param = torch.nn.Parameter(torch.zeros(rows, 128))
        optimizer = PagedAdamW8bit([param])
        param.grad = torch.ones_like(param)
        optimizer.step()
        param.grad = None
        param.data = torch.zeros(2 * rows, 128)  # `load_adapter` with another rank
        param.grad = torch.ones_like(param)
        with pytest.raises(ValueError, match=rf"shape \[{2 * rows}, 128\] has state of shape \[{rows}, 128\]"):
            optimizer.step()


def test_frozen_integer_parameters_in_the_list_are_skipped():
    frozen = torch.nn.Parameter(torch.zeros(5000, dtype=torch.uint8), requires_grad=False)
    trained = torch.nn.Parameter(torch.ones(8))
    trained.grad = torch.ones(8)
    optimizer = PagedAdamW8bit([frozen, trained])
    optimizer.step()
    assert list(optimizer.state) == [trained]


def test_a_launch_has_tensors_of_one_device(monkeypatch):
    """The kernels get addresses: those of another device would be read as this device's memory."""
    devices = []

    def record(*arguments):
        devices.append({tensor.device.type for tensor in tree_leaves(arguments[:-1])})

    monkeypatch.setattr(adamw8bit, "adamw_step", record)
    monkeypatch.setattr(adamw8bit, "adamw8bit_step", record)
    params = [torch.nn.Parameter(torch.ones(n, device=device)) for n in (16, 5000) for device in ("cpu", "meta")]
    for param in params:
        param.grad = torch.ones_like(param)
    PagedAdamW8bit(params).step()
    assert sorted(map(sorted, devices)) == [["cpu"], ["cpu"], ["meta"], ["meta"]]


def test_under_another_default_device_the_step_counter_is_on_the_cpu():
    param = torch.nn.Parameter(torch.ones(5000))
    param.grad = torch.ones(5000)
    with torch.device("meta"):
        optimizer = PagedAdamW8bit([param])
        optimizer.step()
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"step": 3}}})
    assert optimizer.state[param]["step"].device.type == "cpu"
    assert optimizer.state[param]["step"] == 3


@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
def test_no_parameters_is_torchs_error(kind):
    for parameters in ([], iter([])):
        with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
            kind(parameters)
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        kind(torch.zeros(2))


@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
def test_a_learning_rate_that_changed_is_loaded_and_defaults_are_those_of_the_paper(kind):
    params = [torch.nn.Parameter(torch.ones(300))]
    saved, other = (kind(params, lr=1e-2) for _ in range(2))
    saved.param_groups[0].update(lr=5e-4, weight_decay=0.3)
    other.load_state_dict(saved.state_dict())
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (5e-4, 0.3)
    torch_defaults = torch.optim.AdamW(params, lr=2e-4, weight_decay=0.0).defaults
    defaults = kind(params).defaults
    assert {name: torch_defaults[name] for name in defaults} == defaults
    zeros = {"lr": 0.0, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    assert kind(params, **zeros).defaults.items() >= zeros.items()
    assert PagedAdamW(params, amsgrad=True).defaults["amsgrad"]
