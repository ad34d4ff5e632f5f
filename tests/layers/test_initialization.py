"""Initial values of adapters: PEFT's where PEFT has them, and better than zero where it says so."""

import copy
import math

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_qlora import QLoRAConfig, QLoRALinear, convert, quantize
from lightning_qlora.layers import initialization
from tests.toys import assert_equal, delta

R = 8


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(96, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def peft_model(net, base=None, **arguments):
    """PEFT's LoRA of a dense model; the weights are replaced by the given ones after the initialization."""
    config = LoraConfig(r=R, lora_alpha=R, target_modules=["up", "down"], lora_dropout=0.0)
    for name, value in arguments.items():
        setattr(config, name, value)
    model = get_peft_model(net, config)
    for name, weight in (base or {}).items():
        getattr(model.base_model.model, name).get_base_layer().weight.data = weight
    return model


def decoded(net):
    return {name: layer.decode() for name, layer in net.named_modules() if isinstance(layer, QLoRALinear)}


def pairs(ours, peft):
    """Each parameter of our adapters, and PEFT's."""
    for name in ("up", "down"):
        mine, theirs = getattr(ours, name), getattr(peft.base_model.model, name)
        yield mine.lora_A, theirs.lora_A["default"].weight
        yield mine.lora_B, theirs.lora_B["default"].weight
        if mine.lora_magnitude_vector is not None:
            yield mine.lora_magnitude_vector, theirs.lora_magnitude_vector["default"].weight


@torch.no_grad()
def copy_adapter(ours, peft, noise=0.0):
    """Add noise to our adapter, so that nothing is zero, and copy it to PEFT's model."""
    generator = torch.Generator().manual_seed(1)
    for mine, theirs in pairs(ours, peft):
        mine += noise * torch.randn(mine.shape, generator=generator)
        theirs.copy_(mine)


def compare(ours, peft, gradients=True):
    x = torch.randn(3, 5, 96)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = ours(inputs[0]), peft(inputs[1])
    assert_close(*outputs, rtol=1e-5, atol=1e-5)
    if gradients:
        for y in outputs:
            y.square().mean().backward()
        for mine, theirs in (inputs, *pairs(ours, peft)):
            assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def converted(net=None, **arguments):
    net = copy.deepcopy(net) if net is not None else Net()
    convert(net, **{"r": R, "lora_alpha": R, "lora_dropout": 0.0, **arguments})
    return net


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"use_dora": True, "use_rslora": True},
        {"rank_pattern": {"up": 4}, "alpha_pattern": {"down": 16}},
        {"rank_pattern": {"(up|nothing)": 4}, "alpha_pattern": {"u.": 2.5}, "use_rslora": True, "use_dora": True},
    ],
    ids=str,
)
def test_adapters_compute_what_pefts_do(arguments):
    net = Net()
    ours = converted(net, **arguments)
    peft = peft_model(net, decoded(ours), **arguments)
    copy_adapter(ours, peft, noise=0.05)
    compare(ours, peft)


def test_initial_magnitudes_are_pefts_and_do_not_change_the_output_also_of_a_row_of_zeros():
    net = Net()
    net.up.weight.data[3] = 0
    ours = converted(net, use_dora=True)
    plain = converted(net)
    for name, weight in decoded(ours).items():
        magnitude = getattr(ours, name).lora_magnitude_vector
        assert_close(magnitude.detach(), torch.linalg.norm(weight, dim=1))
    x = torch.randn(4, 96)
    assert_close(ours(x), plain(x))
    ours(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.up.adapter_parameters())


def test_loftq_of_one_iteration_is_pefts():
    """PEFT's own loftq_init needs CUDA: this is its body, with bitsandbytes' quantization and its decomposition."""
    net = Net()
    ours = converted(net, init_lora_weights="loftq", double_quant=False)
    base = {}
    factors = {}
    for name in ("up", "down"):
        weight = getattr(net, name).weight.detach()
        codes, state = bnb.functional.quantize_4bit(weight.reshape(1, -1), quant_type="nf4", compress_statistics=False)
        base[name] = bnb.functional.dequantize_4bit(codes, state).reshape(weight.shape)
        factors[name] = _low_rank_decomposition(weight - base[name], reduced_rank=R)
    peft = peft_model(net, base)
    for name, factor in factors.items():
        layer = getattr(peft.base_model.model, name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = factor["R"], factor["L"]
    compare(ours, peft, gradients=False)
    for name, factor in factors.items():  # singular vectors are known up to their signs
        layer = getattr(ours, name)
        assert_close(layer.lora_A.abs().detach(), factor["R"].abs(), rtol=1e-3, atol=1e-4)
        assert_close(delta(layer), factor["L"] @ factor["R"], rtol=1e-3, atol=1e-4)
    copy_adapter(ours, peft)
    compare(ours, peft)


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_16"])
def test_pissa_is_pefts_with_a_quantized_residual(method):
    net = Net()
    ours = converted(net, init_lora_weights=method, use_rslora=True)
    peft = peft_model(copy.deepcopy(net), init_lora_weights=method, use_rslora=True)
    for name in ("up", "down"):
        layer = getattr(ours, name)
        other = getattr(peft.base_model.model, name)
        theirs = other.get_delta_weight("default")
        assert abs(delta(layer).norm() / theirs.norm() - 1) < 0.03
        if method == "pissa":
            assert_close(delta(layer), theirs, rtol=1e-3, atol=1e-5)
            same = layer.packed_weight.packed == quantize(other.get_base_layer().weight).packed
            assert same.float().mean() > 0.999  # a rounding of the SVD may move a weight across a bound
        other.get_base_layer().weight.data = layer.decode()
    if method == "pissa":
        compare(ours, peft, gradients=False)
    copy_adapter(ours, peft)
    compare(ours, peft)


def test_each_iteration_reduces_the_error_and_that_of_loftq_is_larger():
    """Whatever the scaling is."""
    net = Net()
    x = torch.randn(64, 96)

    def error(method, iterations):
        arguments = {"init_lora_weights": method, "loftq_config": {"loftq_iter": iterations}} if iterations else {}
        one, quarter = (converted(net, lora_alpha=alpha, **arguments) for alpha in (R, R / 4))
        assert_close(one(x), quarter(x), rtol=1e-3, atol=1e-4)
        layers = ((getattr(net, name).weight, getattr(one, name)) for name in ("up", "down"))
        return sum((weight - layer.decode() - delta(layer)).square().sum().item() for weight, layer in layers)

    loftq = [error("loftq", iterations) for iterations in (0, 1, 5)]
    pissa = [error("pissa", iterations) for iterations in (1, 2, 5)]
    for errors in (loftq, pissa):
        assert errors[0] > errors[1] > errors[2]
    assert max(pissa[2], error("pissa_niter_16", 5)) < loftq[2]


def test_gaussian_and_default_have_pefts_spread():
    for method, deviation in (("gaussian", 1 / R), ("default", 1 / math.sqrt(3 * 96))):
        layer = converted(init_lora_weights=method).up
        assert not layer.lora_B.any()
        assert abs(layer.lora_A.std().item() / deviation - 1) < 0.1
        assert method == "gaussian" or 0.95 < layer.lora_A.abs().max() * math.sqrt(96) <= 1


@pytest.mark.parametrize("method", ["default", "gaussian", "loftq", "pissa", "pissa_niter_4"])
def test_initial_values_depend_only_on_the_name_and_the_seed(method, monkeypatch):
    net = Net()
    state = torch.get_rng_state()
    first = converted(net, init_lora_weights=method)
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(7)
    second = converted(net, init_lora_weights=method)
    assert_equal([*first.parameters()], [*second.parameters()])
    assert not torch.equal(first.up.lora_A[:, :64], first.down.lora_A[:, :64])
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    third = converted(net, init_lora_weights=method)
    assert torch.equal(first.up.lora_A, third.up.lora_A) == (method in ("loftq", "pissa"))


@pytest.mark.parametrize("method", ["default", "loftq", "pissa"])
def test_a_weight_without_data_gets_the_shapes_and_types_of_a_base_and_an_adapter(method):
    config = QLoRAConfig(r=4, init_lora_weights=method)
    dense = torch.randn(96, 64, dtype=torch.bfloat16)
    expected = initialization.initialize(dense, config, "")
    with torch.device("meta"):
        fake = initialization.initialize(dense.to("meta"), config, "")
    for ours, other in zip((*fake[0][:3], *fake[1:]), (*expected[0][:3], *expected[1:]), strict=True):
        assert ours.is_meta and (ours.shape, ours.dtype) == (other.shape, other.dtype)


@pytest.mark.parametrize(
    ("method", "dtype"), [("loftq", torch.bfloat16), ("pissa", torch.float16), ("pissa_niter_4", torch.bfloat16)]
)
def test_16_bit_weights_keep_their_type(method, dtype):
    net = Net().to(dtype)
    ours = converted(net, init_lora_weights=method, use_dora=True)
    assert ours.up.weight.dtype == dtype
    assert ours(torch.randn(2, 96, dtype=dtype)).dtype == dtype
    assert {p.dtype for layer in (ours.up, ours.down) for p in layer.adapter_parameters()} == {torch.float32}


def test_an_adapter_of_a_weight_without_quantization_error_can_train():
    net = Net()
    net.up.weight.data = quantize(net.up.weight, double_quant=False).dequantize()
    ours = converted(net, init_lora_weights="loftq", double_quant=False)
    assert_close(delta(ours.up), torch.zeros(128, 96), atol=1e-5, rtol=0)
    ours(torch.randn(4, 96)).square().mean().backward()
    assert (ours.up.lora_B.grad.abs().sum(0) > 0).all()


@pytest.mark.parametrize("method", ["pissa", "loftq", "calibrated"])
def test_more_ranks_than_singular_values_are_refused(method):
    for device in ("meta", "cpu"):
        with pytest.raises(ValueError, match=r"^r=17: a 16x64 weight has only 16 singular values.*rank_pattern"):
            initialization.initialize(
                torch.ones(16, 64, device=device), QLoRAConfig(r=17, init_lora_weights=method), ""
            )


def test_pissa_of_all_singular_values_is_the_weight():
    net = nn.Sequential(nn.Linear(64, 16))
    dense = net[0].weight.detach().clone()
    convert(net, r=16, lora_alpha=16, target_modules=["0"], init_lora_weights="pissa")
    assert_close(net[0].weight, dense, rtol=0, atol=0.05 * dense.abs().max().item())


@pytest.mark.parametrize(
    "arguments", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "loftq"}, {"use_dora": True}]
)
def test_loading_a_dense_checkpoint_initializes_adapters_from_its_weights(arguments):
    first = Net()
    second = Net()
    ours = converted(first, **arguments)
    ours.load_state_dict(second.state_dict())
    x = torch.randn(2, 96)
    assert_close(ours(x), converted(second, **arguments)(x))


def test_exact_and_sketched_factors_are_those_of_an_svd():
    for shape in ((40, 70), (70, 40)):
        u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        sigma = 0.8 ** torch.arange(40)
        best = (u[:, :R] * sigma[:R]) @ v[:R]
        for factors in (
            initialization.exact((u * sigma) @ v, R),
            initialization.sketched((u * sigma) @ v, R, 30, seed=0),
        ):
            assert_close(factors[1], sigma[:R], rtol=1e-4, atol=1e-5)
            assert_close((factors[0] * factors[1]) @ factors[2].T, best, rtol=1e-4, atol=1e-5)


def test_a_sketch_has_the_same_bits_wherever_the_matrix_is_in_memory():
    """A file's tensors are at multiples of 8 bytes."""
    memory = torch.empty(64 * 64 + 16)
    weight = torch.randn(64, 64)
    expected = initialization.sketched(weight, 4, 2, seed=0)
    for begin in range(16):
        moved = memory[begin:][: weight.numel()].view(64, 64).copy_(weight)
        assert_equal(initialization.sketched(moved, 4, 2, seed=0), expected)


@pytest.mark.parametrize(
    "decompose", [lambda m: initialization.exact(m, 4), lambda m: initialization.sketched(m, 4, 1, 0)]
)
def test_a_device_without_fp64_and_decompositions_leaves_them_to_another(decompose, monkeypatch):
    """As Apple's MPS. Here the other device is one that holds no data, so that only what runs there is seen."""
    assert initialization.solver_device(torch.device("mps")) == torch.device("cpu")
    assert initialization.solver_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    monkeypatch.setattr(initialization, "solver_device", lambda _: torch.device("meta"))
    here = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for each in tree_leaves((args, result)):
                if isinstance(each, torch.Tensor) and not each.is_meta:
                    name = str(function)
                    if each.dtype == torch.float64 or "eigh" in name or "qr" in name or "svd" in name:
                        here.append(name)
            return result

    with Ops(), pytest.raises(NotImplementedError, match="meta"):  # the result can't be copied back
        decompose(torch.randn(8, 12))
    assert not here
