"""Every row of `initializations.INITIALIZATIONS` is true: a new one runs through all of these tests."""

import copy
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
from torch import nn

from lightning_qlora import CheckpointMismatchError, calibrate, convert, disable_adapter, quantize, save_adapter
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.initializations import INITIALIZATIONS, InitLoRAWeights
from lightning_qlora.layers.initialization import STARTS
from tests.toys import assert_equal, delta, perturb

pytestmark = pytest.mark.filterwarnings("ignore:These adapters were initialized as")
X = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)
CASES = [(name, None) for name in INITIALIZATIONS]
CASES += [(name, {"loftq_iter": 2}) for name, kind in INITIALIZATIONS.items() if kind.iterates]
every = pytest.mark.parametrize(("name", "loftq_config"), CASES)


def body():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))


def started(name, loftq_config, net, **arguments):
    arguments |= {"init_lora_weights": name, "loftq_config": loftq_config}
    convert(net, r=4, lora_alpha=8, lora_dropout=0.0, **arguments)
    return net


def begun(name, loftq_config=None, net=None, **arguments):
    """A converted module with the values that training begins with."""
    net = started(name, loftq_config, net or body(), **arguments)
    if INITIALIZATIONS[name].needs_data:
        net(X).square().mean().backward()
        calibrate(net)
        net.zero_grad()
    return net


def layers(net):
    return [net[0], net[2]]


@contextmanager
def another_machine(monkeypatch):
    """One whose linear algebra has other last bits, each time."""
    generator = torch.Generator().manual_seed(5)
    with monkeypatch.context() as patch:
        for function in ("eigh", "svd", "qr"):
            original = getattr(torch.linalg, function)

            def with_other_bits(*args, original=original, **kwargs):
                results = original(*args, **kwargs)
                return type(results)([x * (1 + 1e-6 * torch.randn(x.shape, generator=generator)) for x in results])

            patch.setattr(torch.linalg, function, with_other_bits)
        yield


def test_the_names_are_those_of_the_argument_and_each_has_a_function():
    assert [*INITIALIZATIONS] == [*get_args(get_args(InitLoRAWeights)[0])] == [*STARTS]
    assert [name for name in INITIALIZATIONS if f'"{name}"' not in QLoRAConfig.__doc__] == []


@every
def test_the_base_is_quantize_of_the_weight_or_the_row_says_otherwise(name, loftq_config):
    dense, net = body(), begun(name, loftq_config)
    config = QLoRAConfig(init_lora_weights=name, loftq_config=loftq_config)
    for layer, before in zip(layers(net), layers(dense), strict=True):
        ours, expected = (weight.bnb_state_dict() for weight in (layer.packed_weight, quantize(before.weight)))
        assert all(ours[key].equal(value) for key, value in expected.items()) != config.changes_base
        weight = layer.effective_weight()
        assert (weight - before.weight).norm() < 0.12 * before.weight.norm()  # the module begins as the dense one


@every
def test_without_its_adapter_it_is_the_pretrained_model_or_an_error(name, loftq_config):
    dense, net = body(), begun(name, loftq_config)
    perturb(net)
    if INITIALIZATIONS[name].moves_weight:
        with pytest.raises(ValueError, match="which moves a large part of the weight"), disable_adapter(net):
            pass
        return
    expected = dense(X)
    with disable_adapter(net):
        assert (net(X) - expected).norm() < 0.15 * expected.norm()
    for layer, before in zip(layers(net), layers(dense), strict=True):
        assert (layer.decode() - before.weight).norm() < 0.12 * before.weight.norm()


@every
@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
def test_a_checkpoint_loads_on_a_machine_with_other_last_bits(name, loftq_config, checkpoint, monkeypatch):
    first = begun(name, loftq_config, checkpoint=checkpoint)
    start = copy.deepcopy([layer.initial for layer in layers(first)])
    perturb(first)
    with another_machine(monkeypatch):
        second = begun(name, loftq_config, checkpoint=checkpoint)
        pairs = [*zip(layers(begun(name, loftq_config)), layers(second), strict=True)]
        bits = [one.effective_weight().equal(other.effective_weight()) for one, other in pairs]
        assert all(bits) == INITIALIZATIONS[name].exact
        second.load_state_dict(first.state_dict())
    assert torch.equal(second(X), first(X))
    for layer, initial in zip(layers(second), start, strict=True):
        assert (initial is not None) == INITIALIZATIONS[name].keeps_initial
        if initial is not None:
            assert_equal(layer.initial, initial)


@every
def test_a_checkpoint_of_another_base_is_refused_or_brings_its_own(name, loftq_config):
    first, other = begun(name, loftq_config), body()
    other[0].weight.data += 0.05
    second = begun(name, loftq_config, other)
    config = QLoRAConfig(init_lora_weights=name, loftq_config=loftq_config)
    if config.can_repeat_base:
        with pytest.raises(CheckpointMismatchError, match="another base weight"):
            second.load_state_dict(first.state_dict())
    else:
        second.load_state_dict(first.state_dict())
        assert torch.equal(second(X), first(X))


@every
def test_the_adapter_for_the_float_base_is_what_training_changed(name, loftq_config, tmp_path):
    dense, net = body(), begun(name, loftq_config)
    before = [delta(layer) for layer in layers(net)]
    perturb(net)
    after = [delta(layer) for layer in layers(net)]
    for module in (net, resumed(net, name, loftq_config)):
        save_adapter(module, tmp_path, base="float")
        theirs = body()
        convert(theirs, adapter=str(tmp_path), lora_dropout=0.0)
        for layer, one, other in zip(layers(theirs), before, after, strict=True):
            torch.testing.assert_close(delta(layer), other - one, atol=1e-5, rtol=1e-4)
    twin = copy.deepcopy(dense)
    with torch.no_grad():
        for layer, one, other in zip(layers(twin), before, after, strict=True):
            layer.weight += other - one
    expected = twin(X)
    assert (net(X) - expected).norm() < 0.15 * expected.norm()


def resumed(net, name, loftq_config):
    """The module of a run that goes on from a checkpoint: it was converted and has made no step."""
    other = started(name, loftq_config, body())
    other.load_state_dict(net.state_dict())
    other(X).square().mean().backward()
    torch.optim.SGD(other.parameters(), lr=0.0).step()
    assert torch.equal(other(X), net(X)) and all(layer.input_statistics is None for layer in layers(other))
    return other


@every
def test_autocast_changes_no_value(name, loftq_config):
    expected = begun(name, loftq_config).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        net = started(name, loftq_config, body())
    if not INITIALIZATIONS[name].needs_data:  # else it has its values after a step
        assert_equal(net.state_dict(), expected)
