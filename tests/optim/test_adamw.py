import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qlora.kernels.reference import dequantize_state, quantize_state
from lightning_qlora.optim import adamw
from lightning_qlora.optim.adamw import PagedAdamW, PagedAdamW8bit
from lightning_qlora.optim.state_8bit import to_32bit
from tests.optim.stand_in import assert_all_paged
from tests.optim.test_optimizer_pages import assert_equal_parameters, attached, model, train


def regression_loss(make_optimizer, steps=300):
    """Loss of a small network on a noisy regression after 300 steps, averaged over the last 20."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64))
    target = torch.nn.Linear(64, 64)
    optimizer = make_optimizer(net.parameters())
    losses = []
    for step in range(steps):
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


@pytest.mark.parametrize("rest", ["8 bits", "decoded to 32 bits"])
def test_gradients_that_get_small_beside_a_large_one_make_no_long_steps(rest):
    """The second moment of the small ones has code 0, and their first has not; without a bound steps of 9,859."""
    param = torch.nn.Parameter(torch.zeros(4096))
    optimizer = PagedAdamW8bit([param], lr=1e-3)
    for small in (3e-4, 3e-6, 0.0):
        if small == 0 and rest != "8 bits":
            saved = optimizer.state_dict()
            assert not decoded(saved["state"][0])[1][1]
            optimizer = PagedAdamW([param], lr=1e-3)
            optimizer.load_state_dict(saved)
        before = param.detach().clone()
        param.grad = torch.full((4096,), small)
        param.grad[::256] = 1.0
        optimizer.step()
        assert 0.5 < (param.detach() - before)[1].abs() / 1e-3 < 1.001


def state_bytes(optimizer):
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values() if t.dim())


def test_state_takes_a_quarter():
    params = [torch.nn.Parameter(torch.randn(1024, 512)), torch.nn.Parameter(torch.randn(64, 64))]
    sizes = []
    for kind in (torch.optim.AdamW, PagedAdamW8bit):
        optimizer = kind(params)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        sizes.append(state_bytes(optimizer))
    assert sizes[1] <= 0.27 * sizes[0]


def test_small_tensors_keep_32_bits():
    params = [torch.nn.Parameter(torch.randn(n)) for n in (4095, 4096)]
    optimizer = PagedAdamW8bit(params)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    small, large = (optimizer.state[p] for p in params)
    assert (small["exp_avg"].dtype, large["exp_avg_codes"].dtype) == (torch.float32, torch.uint8)
    assert "exp_avg_absmax" not in small
    assert large["exp_avg_sq_absmax"].shape == (16,)


@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
def test_paged_equals_unpaged_by_itself(stand_in, kind):
    paged = model()
    optimizer = kind(paged.parameters(), lr=1e-2)
    train(paged, optimizer, 20)
    assert_all_paged(stand_in, optimizer, least=4)
    plain = model()
    if kind is PagedAdamW:
        reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0)
    else:
        reference = PagedAdamW8bit(plain.parameters(), lr=1e-2, paged=False)
    train(plain, reference, 20)
    assert_equal_parameters(plain, paged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("source", "target"), [(True, False), (False, True), (True, True)])
def test_state_round_trips_exactly_between_paged_and_unpaged(stand_in, dtype, source, target, tmp_path):
    net = model().to(dtype)
    optimizer = PagedAdamW8bit(net.parameters(), lr=1e-2, paged=source)
    for param in net.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other = PagedAdamW8bit(copy.deepcopy(net).parameters(), lr=1e-2, paged=target)
    other.load_state_dict(saved)
    again = other.state_dict()
    for index, state in saved["state"].items():
        for key, value in state.items():
            assert again["state"][index][key].dtype == value.dtype
            assert torch.equal(again["state"][index][key], value)
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


def paged_adamw(params):
    return attached(torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0))


@pytest.mark.parametrize("kind", [PagedAdamW, paged_adamw])
def test_8bit_state_loads_decoded_into_a_paged_adamw(stand_in, kind):
    net, saved = trained_in_8bit()
    optimizer = kind(net.parameters())
    optimizer.load_state_dict(saved)
    for param, state in zip(net.parameters(), saved["state"].values(), strict=True):
        loaded = optimizer.state[param]
        assert set(loaded) == {"step", "exp_avg", "exp_avg_sq"}
        assert loaded["step"] == 5
        for value, expected in zip((loaded["exp_avg"], loaded["exp_avg_sq"]), decoded(state), strict=True):
            assert value.dtype == torch.float32
            assert torch.equal(value, expected)
    assert_all_paged(stand_in, optimizer, least=4)
    train(net, optimizer, 1)


def test_a_run_goes_on_in_32bit_as_if_it_had_been_decoded_by_hand():
    net, saved = trained_in_8bit()
    by_hand = copy.deepcopy(net)
    reference = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.0)
    for param, state in zip(by_hand.parameters(), saved["state"].values(), strict=True):
        m, v = (moment.clone() for moment in decoded(state))
        reference.state[param] = {"step": state["step"].clone(), "exp_avg": m, "exp_avg_sq": v}
    optimizer = PagedAdamW(net.parameters(), lr=1e-2)
    optimizer.load_state_dict(saved)
    train(net, optimizer, 5)
    train(by_hand, reference, 5)
    assert_equal_parameters(by_hand, net)


@pytest.mark.parametrize("choice", [{"foreach": True}, {"foreach": False}])
def test_an_adamw_that_is_not_paged_does_not_train_on_codes(choice):
    net, saved = trained_in_8bit()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, **choice)
    optimizer.load_state_dict(saved)
    with pytest.raises(KeyError, match="exp_avg"):
        train(net, optimizer, 1)


def test_gathered_shards_are_decoded_each_with_its_own_blocks():
    values = torch.randn(5, 1000)
    codes, scales = torch.zeros(5, 1000, dtype=torch.uint8), torch.zeros(2, 12)  # 3000 and 2000 elements, 12 blocks
    for number, (part, of_part) in enumerate(zip(values.chunk(2), codes.chunk(2), strict=True)):
        own = scales[number][: -(-part.numel() // 256)]
        quantize_state(part, of_part, own, signed=True)
    state = {"step": torch.tensor(1.0), "shards": torch.tensor(2)}
    for name in ("exp_avg", "exp_avg_sq"):
        state |= {f"{name}_codes": codes, f"{name}_absmax": scales.view(-1)}
    assert (to_32bit(state, (0.9, 0.999))["exp_avg"] - values).abs().max() < 0.1


@pytest.mark.parametrize("shards", [2, 3])
def test_gathered_shards_are_quantized_again_for_one_device(shards):
    """48 rows of 300: blocks of 256 cross the shards, so their scales have no block here."""
    whole = {"exp_avg": torch.randn(48, 300), "exp_avg_sq": torch.rand(48, 300)}
    state = {"step": torch.tensor(7.0), "shards": torch.tensor(shards)}
    for name, value in whole.items():
        parts = value.chunk(shards)
        codes = [torch.empty(part.shape, dtype=torch.uint8) for part in parts]
        absmax = [torch.empty(-(-part.numel() // 256)) for part in parts]
        for part in zip(parts, codes, absmax, strict=True):
            quantize_state(*part, signed=name == "exp_avg")
        state |= {f"{name}_codes": torch.cat(codes), f"{name}_absmax": torch.cat(absmax)}
    optimizer = PagedAdamW8bit([torch.nn.Parameter(torch.randn(48, 300))])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
    (loaded,) = optimizer.state.values()
    assert loaded["step"] == 7 and "shards" not in loaded
    for name, value in to_32bit(dict(loaded), (0.9, 0.999)).items():
        if name != "step":
            assert value.sub(whole[name]).norm() < 0.02 * whole[name].norm()


def test_loading_does_not_share_memory_with_the_state_dict():
    net = model()
    optimizer = PagedAdamW8bit(net.parameters())
    train(net, optimizer, 1)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = PagedAdamW8bit(model().parameters())
    other.load_state_dict(saved)
    train(model(), other, 1)
    for param in other.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    other.step()
    assert torch.equal(saved["state"][0]["exp_avg_codes"], before["state"][0]["exp_avg_codes"])
    assert saved["state"][0]["step"] == before["state"][0]["step"]


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
        ("lr", -1, ValueError, "lr=-1"),
        ("eps", "1e-8", TypeError, "eps='1e-8'"),
        ("eps", -1e-8, ValueError, "eps=-1e-08"),
        ("weight_decay", [0.1], TypeError, "weight_decay=[0.1]"),
        ("weight_decay", float("nan"), ValueError, "weight_decay=nan"),
        ("betas", 0.9, TypeError, "betas=0.9"),
        ("betas", ("0.9", "0.999"), TypeError, "betas[0]='0.9'"),
        ("betas", (0.9,), ValueError, "betas=(0.9,)"),
        ("betas", (0.9, 0.99, 0.999), ValueError, "betas=(0.9, 0.99, 0.999)"),
        ("betas", (0.9, 1.0), ValueError, "betas[1]=1.0"),
    ],
)
def test_what_is_no_number_of_its_range_is_refused(name, value, error, found):
    message = rf"^{re.escape(found)}: must be (a number|a finite number|two numbers)"
    param = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(error, match=message):
        PagedAdamW8bit([param], **{name: value})
    with pytest.raises(error, match=message):
        PagedAdamW8bit([{"params": [param], name: value}])


def test_numbers_may_be_tensors_and_betas_a_list(monkeypatch):
    """The kernels of a GPU get floats: Triton would take a tensor as an address."""
    given = []
    step = adamw.adamw_step
    monkeypatch.setattr(adamw, "adamw_step", lambda *args: given.append(args[-1]) or step(*args))
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
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="SparseAdam"):
        PagedAdamW8bit(embedding.parameters()).step()


def test_a_sparse_gradient_after_a_dense_one_is_refused():
    embedding = torch.nn.Embedding(100, 64, sparse=True)
    optimizer = PagedAdamW8bit(embedding.parameters())
    embedding.weight.grad = torch.ones(100, 64)
    optimizer.step()
    optimizer.zero_grad()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"sparse gradient.*SparseAdam"):
        optimizer.step()
    assert optimizer.state[embedding.weight]["step"] == 1


def test_frozen_integer_parameters_in_the_list_are_skipped():
    frozen = torch.nn.Parameter(torch.zeros(5000, dtype=torch.uint8), requires_grad=False)
    trained = torch.nn.Parameter(torch.ones(8))
    trained.grad = torch.ones(8)
    optimizer = PagedAdamW8bit([frozen, trained])
    optimizer.step()
    assert list(optimizer.state) == [trained]


def test_by_name_from_yaml():
    jsonargparse = pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import OptimizerCallable

    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--optimizer", type=OptimizerCallable)
    text = '{"class_path": "lightning_qlora.optim.adamw.PagedAdamW8bit", "init_args": {"lr": 0.1}}'
    arguments = parser.parse_args([f"--optimizer={text}"])
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the older name before 4.49
    optimizer = instantiate(arguments).optimizer(model().parameters())
    assert isinstance(optimizer, PagedAdamW8bit)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_default_type_of_float64_changes_no_state():
    parameter = torch.nn.Parameter(torch.randn(64, 128))
    parameter.grad = torch.randn(64, 128)
    optimizer = PagedAdamW8bit([parameter])
    torch.set_default_dtype(torch.float64)
    try:
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in optimizer.state[parameter].values()} == {torch.float32, torch.uint8}


def test_paged_must_be_a_bool():
    with pytest.raises(TypeError, match="paged='no': must be True or False"):
        PagedAdamW8bit([torch.nn.Parameter(torch.zeros(2))], paged="no")


def test_a_launch_has_tensors_of_one_device(monkeypatch):
    """The kernels get addresses: those of another device would be read as this device's memory."""
    devices = []

    def record(*arguments):
        *lists, _ = arguments
        devices.append({tensor.device.type for tensors in lists for tensor in tensors})

    monkeypatch.setattr(adamw, "adamw_step", record)
    monkeypatch.setattr(adamw, "adamw8bit_step", record)
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
def test_no_parameters_is_an_error_that_says_what_to_do(kind):
    for parameters in ([], iter([])):
        with pytest.raises(ValueError, match=rf"{kind.__name__} got no parameters.*configure_model.*OptimizerCallable"):
            kind(parameters)


@pytest.mark.parametrize("kind", [PagedAdamW, PagedAdamW8bit])
def test_a_learning_rate_that_changed_is_loaded(kind):
    saved, other = (kind([torch.nn.Parameter(torch.ones(300))], lr=1e-2) for _ in range(2))
    saved.param_groups[0].update(lr=5e-4, weight_decay=0.3)
    other.load_state_dict(saved.state_dict())
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (5e-4, 0.3)
