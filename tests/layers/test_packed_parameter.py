"""Averages over parameters(), as methods that keep a second network write them."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_qlora import convert
from tests.toys import perturb


def networks(double_quant=True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    convert(net, r=4, double_quant=double_quant)
    return perturb(net, seed=1), perturb(copy.deepcopy(net), seed=2)


def pairs(net, target):
    return zip(net.parameters(), target.parameters(), strict=True)


def lists(net, target):
    return list(net.parameters()), list(target.parameters())


def in_place(net, target):
    for p, e in pairs(net, target):
        e.mul_(0.9).add_(p, alpha=0.1)


def data(net, target):
    for p, e in pairs(net, target):
        e.data.mul_(0.9).add_((1 - 0.9) * p.detach().data)


def two_loops(net, target):
    for e in target.parameters():
        e.data.mul_(torch.tensor(0.9))
    for p, e in pairs(net, target):
        e.data.add_(p.data, alpha=0.1)


def operators(net, target):
    for p, e in pairs(net, target):
        e.data = e.data * 0.9 + p.data * 0.1


def copied(net, target):
    for p, e in pairs(net, target):
        e.copy_(0.9 * e + (1 - 0.9) * p)


def summed(net, target):
    for p, e in pairs(net, target):
        e.copy_(sum([9 * e, p]) / 10)


def difference(net, target):
    for p, e in pairs(net, target):
        e.sub_((1 - 0.9) * (e - p))


def augmented(net, target):
    for p, e in pairs(net, target):
        e *= 0.9
        e += 0.1 * p


def lerp(net, target):
    for p, e in pairs(net, target):
        e.lerp_(p, 0.1)


def lerp_function(net, target):
    for p, e in pairs(net, target):
        e.copy_(torch.lerp(e, p, 0.1))


def foreach(net, target):
    params, averages = lists(net, target)
    torch._foreach_mul_(averages, 0.9)
    torch._foreach_add_(averages, params, alpha=0.1)


def foreach_lerp(net, target):
    params, averages = lists(net, target)
    torch._foreach_lerp_(averages, params, 0.1)


WAYS = [
    in_place,
    data,
    two_loops,
    operators,
    copied,
    summed,
    difference,
    augmented,
    lerp,
    lerp_function,
    foreach,
    foreach_lerp,
]


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_adapters_are_averaged_and_the_base_keeps_its_bytes(way, double_quant):
    net, target = networks(double_quant)
    before = copy.deepcopy(target)
    for _ in range(2):
        with torch.no_grad():
            way(net, target)
    for (name, e), old, p in zip(target.named_parameters(), before.parameters(), net.parameters(), strict=True):
        if e.is_floating_point():
            torch.testing.assert_close(e, 0.81 * old + 0.19 * p)
        else:
            assert e.dtype is torch.uint8 and torch.equal(e, old), name
    x = torch.randn(3, 64)
    target(x).sum().backward()
    assert target[0].lora_A.grad is not None


@pytest.mark.parametrize("options", [{}, {"avg_fn": get_ema_avg_fn(0.9)}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
def test_torchs_averaged_model(options):
    net, _ = networks()
    average, first = AveragedModel(net, **options), copy.deepcopy(net)
    for seed in range(3):
        perturb(net, seed=seed)
        average.update_parameters(net)
    for (name, e), old in zip(average.module.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(e, old) if e.dtype is torch.uint8 else not e.requires_grad or not torch.equal(e, old), name


def weight_decay(net, target):
    for e in target.parameters():
        e.mul_(0.99)
    target(torch.randn(2, 64))


WRONG = {
    "a half": (lambda net, target: [e.mul_(0.5).add_(p, alpha=0.1) for p, e in pairs(net, target)], "0.6 times itself"),
    "a number": (lambda net, target: [e.add_(0.1) for e in target.parameters()], "^add_: 4-bit weights are codes"),
    "noise": (lambda net, target: [e.add_(torch.randn(e.shape)) for e in target.parameters()], "^add_: 4-bit"),
    "a product": (lambda net, target: [e.mul_(p) for p, e in pairs(net, target)], "^mul_: 4-bit"),
    "weight decay": (weight_decay, "0.99 times itself"),
    "a function": (lambda net, target: [torch.sin(0.5 * e) for e in target.parameters()], "sin: 4-bit"),
    "another tensor": (
        lambda net, target: [torch.zeros(e.shape).copy_(0.5 * e) for e in target.parameters()],
        "copy_: 4-bit",
    ),
}


@pytest.mark.parametrize(("way", "message"), WRONG.values(), ids=WRONG)
def test_other_arithmetic_is_an_error_that_says_which_parameters_to_skip(way, message):
    net, target = networks()
    before = [p.clone() for p in target.parameters() if not p.is_floating_point()]
    with torch.no_grad(), pytest.raises(RuntimeError, match=message) as caught:
        way(net, target)
    assert "is_floating_point()" in str(caught.value)
    assert all(map(torch.equal, before, [p for p in target.parameters() if not p.is_floating_point()]))
    target(torch.randn(2, 64))  # nothing is left of it


def test_different_bases_are_an_error():
    net, target = networks()[0], nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    convert(target, r=4)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"differ.*is_floating_point\(\)"):
        in_place(net, target)


def test_what_else_reads_and_writes_the_bytes_is_as_before():
    net, target = networks()
    packed = net[0].packed
    assert type(packed.clone()) is type(packed + 0 if packed.is_floating_point() else packed.view(-1)) is torch.Tensor
    assert {type(part) for part in net[0].whole_bytes[:3]} == {torch.Tensor}
    loaded = torch.load(io.BytesIO(_saved(packed.data)), weights_only=True)
    assert type(loaded) is torch.Tensor and torch.equal(loaded, packed)
    assert type(torch.load(io.BytesIO(_saved(packed)), weights_only=True)) is nn.Parameter
    with torch.no_grad():
        packed.copy_(packed.flip(0))
        packed.data = packed.data.flip(0)
    assert torch.equal(packed, target[0].packed)
    in_place_again = copy.deepcopy(net).to(torch.bfloat16)
    with torch.no_grad():
        in_place(net.to(torch.bfloat16), in_place_again)


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["norm", "normal_", "clamp_"])
def test_what_torch_has_for_floats_only_says_what_to_do(name):
    module = nn.Linear(64, 64)
    convert(module, r=4)
    with pytest.raises(RuntimeError, match=rf"{name}: .*skip them: `if parameter\.is_floating_point"):
        getattr(module.packed, name)(*([0.5] if name == "clamp_" else []))
