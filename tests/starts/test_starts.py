"""Every row of STARTS is true: a new one runs through all of these tests. And "calibrated" has the best values."""

import copy
import math
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_qlora import (
    CheckpointMismatchError,
    QLoRALinear,
    calibrate,
    convert,
    disable_adapter,
    quantize,
    save_adapter,
)
from lightning_qlora.config import InitLoRAWeights, QLoRAConfig
from lightning_qlora.starts import calibrated, input_statistics
from lightning_qlora.starts.starts import STARTS, corrects_error
from tests.toys import assert_equal, delta, perturb

pytestmark = pytest.mark.filterwarnings("ignore:These adapters were initialized as")
X = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 64)
R = 4
every = pytest.mark.parametrize("name", STARTS)


def body():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))


def started(name, net=None, **arguments):
    net = net or body()
    convert(net, **{"r": R, "lora_alpha": 8, "lora_dropout": 0.0, "init_lora_weights": name, **arguments})
    return net


def begun(name, net=None, **arguments):
    """A converted module with the values that training begins with."""
    net = started(name, net, **arguments)
    if STARTS[name].observer is not None:
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


def test_the_names_are_those_of_the_argument():
    assert [*get_args(InitLoRAWeights)] == [*STARTS]
    assert [name for name in STARTS if f'"{name}"' not in QLoRAConfig.__doc__] == []


@every
def test_the_base_is_quantize_of_the_weight_and_the_module_begins_as_the_dense_one(name):
    dense, net = body(), begun(name)
    for layer, before in zip(layers(net), layers(dense), strict=True):
        ours, expected = (weight.bnb_state_dict() for weight in (layer.packed_weight, quantize(before.weight)))
        assert_equal(ours, expected)
        assert (layer.effective_weight() - before.weight).norm() < 0.12 * before.weight.norm()


@every
def test_without_its_adapter_it_is_the_pretrained_model(name):
    dense, net = body(), begun(name)
    perturb(net)
    expected = dense(X)
    with disable_adapter(net):
        assert (net(X) - expected).norm() < 0.15 * expected.norm()
    for layer, before in zip(layers(net), layers(dense), strict=True):
        assert (layer.decode() - before.weight).norm() < 0.12 * before.weight.norm()


@every
@pytest.mark.parametrize("checkpoint", ["adapter", "full"])
def test_a_checkpoint_loads_on_a_machine_with_other_last_bits(name, checkpoint, monkeypatch):
    first = begun(name, checkpoint=checkpoint)
    start = copy.deepcopy([layer.initial for layer in layers(first)])
    perturb(first)
    with another_machine(monkeypatch):
        second = begun(name, checkpoint=checkpoint)
        pairs = zip(layers(begun(name)), layers(second), strict=True)
        same = all(one.effective_weight().equal(other.effective_weight()) for one, other in pairs)
        assert same != corrects_error(second[0].config)  # values of a decomposition
        second.load_state_dict(first.state_dict())
    assert torch.equal(second(X), first(X))
    for layer, initial in zip(layers(second), start, strict=True):
        assert (initial is not None) == corrects_error(layer.config)
        if initial is not None:
            assert_equal(layer.initial, initial)


@every
def test_a_checkpoint_of_another_base_is_refused(name):
    first, other = begun(name), body()
    other[0].weight.data.neg_()
    second = begun(name, other)
    with pytest.raises(CheckpointMismatchError, match="another base weight"):
        second.load_state_dict(first.state_dict())


@every
def test_the_adapter_for_the_float_base_is_what_training_changed(name, tmp_path):
    dense, net = body(), begun(name)
    before = [delta(layer) for layer in layers(net)]
    perturb(net)
    after = [delta(layer) for layer in layers(net)]
    for module in (net, resumed(net, name)):
        save_adapter(module, tmp_path, base="float")
        theirs = body()
        convert(theirs, adapter=str(tmp_path), lora_dropout=0.0)
        for layer, one, other in zip(layers(theirs), before, after, strict=True):
            assert_close(delta(layer), other - one, atol=1e-5, rtol=1e-4)
    twin = copy.deepcopy(dense)
    with torch.no_grad():
        for layer, one, other in zip(layers(twin), before, after, strict=True):
            layer.weight += other - one
    expected = twin(X)
    assert (net(X) - expected).norm() < 0.15 * expected.norm()


def resumed(net, name):
    """The module of a run that goes on from a checkpoint: it was converted and has made no step."""
    other = started(name)
    other.load_state_dict(net.state_dict())
    other(X).square().mean().backward()
    torch.optim.SGD(other.parameters(), lr=0.0).step()
    assert torch.equal(other(X), net(X)) and all(layer.input_observer is None for layer in layers(other))
    return other


@every
def test_autocast_changes_no_value(name):
    expected = begun(name).state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        net = started(name)
    if STARTS[name].observer is None:  # else it has its values after a step
        assert_equal(net.state_dict(), expected)


@every
def test_initial_values_depend_only_on_the_name_and_the_seed(name, monkeypatch):
    state = torch.get_rng_state()
    net = body()
    torch.set_rng_state(state)
    first = started(name, copy.deepcopy(net))
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(7)
    second = started(name, copy.deepcopy(net))
    assert_equal([*first.parameters()], [*second.parameters()])
    assert not torch.equal(first[0].lora_A, first[2].lora_A[:, :64])
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    third = started(name, copy.deepcopy(net))
    assert not torch.equal(first[0].lora_A, third[0].lora_A)


@every
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_weight_without_data_gets_the_shapes_and_types_of_a_base_and_an_adapter(name, use_dora):
    config = QLoRAConfig(r=R, init_lora_weights=name, use_dora=use_dora)
    dense, meta = (
        QLoRALinear.from_linear(nn.Linear(64, 96, device=device), config, "", None, "") for device in ("cpu", "meta")
    )
    for key in ("packed", "absmax", "nested", "lora_A", "lora_B", *(["lora_magnitude_vector"] if use_dora else [])):
        ours, other = getattr(meta, key), getattr(dense, key)
        assert ours.is_meta and (ours.shape, ours.dtype) == (other.shape, other.dtype)


def test_gaussian_and_default_have_pefts_spread():
    for method, deviation in (("gaussian", 1 / R), ("default", 1 / math.sqrt(3 * 64))):
        layer = started(method)[0]
        assert not layer.lora_B.any()
        assert abs(layer.lora_A.std().item() / deviation - 1) < 0.1
        assert method == "gaussian" or 0.95 < layer.lora_A.abs().max() * math.sqrt(64) <= 1


def test_more_ranks_than_singular_values_are_refused_and_the_layer_stays_dense():
    message = r"r=17: a 16x64 weight has only 16 singular values.*rank_pattern"
    config = QLoRAConfig(r=17, init_lora_weights="calibrated")
    with pytest.raises(ValueError, match=message):
        QLoRALinear.from_linear(nn.Linear(64, 16, device="meta"), config, "", None, "")
    net = nn.Sequential(nn.Linear(64, 16))
    weight = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        convert(net, r=17, init_lora_weights="calibrated", target_modules=["0"])
    assert type(net[0]) is nn.Linear
    assert_equal(net[0].weight.detach(), weight)


def test_an_adapter_of_a_weight_without_quantization_error_can_train():
    net = body()
    net[0].weight.data = quantize(net[0].weight, double_quant=False).dequantize()
    ours = begun("calibrated", net, double_quant=False)
    assert_close(delta(ours[0]), torch.zeros(96, 64), atol=1e-5, rtol=0)
    ours(X).square().mean().backward()
    assert (ours[0].lora_B.grad.abs().sum(0) > 0).all()


def test_the_largest_singular_values_are_those_of_an_svd():
    for shape in ((40, 70), (70, 40)):
        u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        sigma = 0.8 ** torch.arange(40)
        best = (u[:, :R] * sigma[:R]) @ v[:R]
        factors = calibrated.largest_singular((u * sigma) @ v, R)
        assert_close(factors[1], sigma[:R], rtol=1e-4, atol=1e-5)
        assert_close((factors[0] * factors[1]) @ factors[2].T, best, rtol=1e-4, atol=1e-5)


def test_a_device_without_fp64_and_decompositions_leaves_them_to_another(monkeypatch):
    """As Apple's MPS. Here the other device is one that holds no data, so that only what runs there is seen."""
    assert input_statistics.solver_device(torch.device("mps")) == torch.device("cpu")
    assert input_statistics.solver_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    monkeypatch.setattr(calibrated, "solver_device", lambda _: torch.device("meta"))
    here = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for each in tree_leaves((args, result)):
                if isinstance(each, torch.Tensor) and not each.is_meta:
                    name = str(function)
                    if each.dtype == torch.float64 or "eigh" in name:
                        here.append(name)
            return result

    with Ops(), pytest.raises(NotImplementedError, match="meta"):  # the result can't be copied back
        calibrated.largest_singular(torch.randn(8, 12), 4)
    assert not here
