import copy

import pytest
import torch

from lightning_qlora.paging import PagedAdamW, PagedAdamW8bit
from tests.paging.stand_in import assert_all_paged
from tests.paging.test_pages import assert_equal_parameters, model, train


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


@pytest.fixture(scope="module")
def adamw_loss():
    first, last = regression_loss(lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01))
    assert last < first / 3, "it must have learnt something"
    return last


def test_8bit_learns_as_well_as_32bit(adamw_loss):
    _, last = regression_loss(lambda params: PagedAdamW8bit(params, lr=2e-3, weight_decay=0.01))
    assert abs(last / adamw_loss - 1) < 0.02


def test_8bit_learns_as_well_as_bitsandbytes(adamw_loss):
    bnb = pytest.importorskip("bitsandbytes")
    _, ours = regression_loss(lambda params: PagedAdamW8bit(params, lr=2e-3, weight_decay=0.01))
    _, theirs = regression_loss(lambda params: bnb.optim.AdamW8bit(params, lr=2e-3, weight_decay=0.01))
    assert abs(ours / theirs - 1) < 0.02


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
    assert (small["exp_avg"].dtype, large["exp_avg"].dtype) == (torch.float32, torch.uint8)
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
    assert torch.equal(saved["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
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
    "arguments", [{"lr": -1}, {"eps": -1e-8}, {"weight_decay": float("nan")}, {"betas": (0.9, 1.0)}]
)
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        PagedAdamW8bit([torch.nn.Parameter(torch.zeros(2))], **arguments)


def test_what_it_cannot_train_is_refused():
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    param.grad = torch.ones_like(param)
    with pytest.raises(TypeError, match="float64"):
        PagedAdamW8bit([param]).step()
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="SparseAdam"):
        PagedAdamW8bit(embedding.parameters()).step()


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
    text = '{"class_path": "lightning_qlora.paging.PagedAdamW8bit", "init_args": {"lr": 0.1}}'
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
