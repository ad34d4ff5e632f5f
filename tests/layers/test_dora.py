"""Adapters that compute what PEFT's do: DoRA, rsLoRA, ranks and alphas by patterns."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from lightning_qlora import QLoRALinear, convert

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


def test_16_bit_weights_keep_their_type():
    for dtype in (torch.bfloat16, torch.float16):
        ours = converted(Net().to(dtype), use_dora=True)
        assert ours.up.weight.dtype == dtype
        assert ours(torch.randn(2, 96, dtype=dtype)).dtype == dtype
        assert {p.dtype for layer in (ours.up, ours.down) for p in layer.adapter_parameters()} == {torch.float32}


def test_loading_a_dense_checkpoint_initializes_the_magnitudes_from_its_weights():
    first = Net()
    second = Net()
    ours = converted(first, use_dora=True)
    ours.load_state_dict(second.state_dict())
    x = torch.randn(2, 96)
    assert_close(ours(x), converted(second, use_dora=True)(x))
