"""The operations that FlopCounterMode counts are those of a frozen dense model with PEFT's adapter."""

import copy

import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_qlora import convert
from tests.layers import test_experts as toys

peft = pytest.importorskip("peft")


def counted(model, x, backward):
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        if backward:
            y.square().sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_operations_of_peft(backward, needs_x, p):
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 96, bias=False), nn.Linear(96, 32))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["0", "2"], lora_dropout=p))
    convert(model, r=4, target_modules=["0", "2"], lora_dropout=p)
    x = torch.randn(2, 5, 64, requires_grad=needs_x)
    assert counted(model.train(), x, backward) == counted(theirs.train(), x, backward) > 0
    assert measure_flops(model, lambda: model(x), torch.sum if backward else None) == counted(model, x, backward)


@pytest.mark.skipif(not hasattr(peft, "LoraConfig"), reason="needs PEFT")
def test_experts():
    """Each expert counts its own rows, as the dense model in a loop does; the rest is the products of the adapters."""
    dense = toys.made(toys.qwen3_moe).eval()
    dense.set_experts_implementation("eager")
    model = copy.deepcopy(dense)
    convert(model, r=2)
    ids = torch.arange(12).view(2, 6)
    with FlopCounterMode(display=False) as expected:
        dense(ids)
    with FlopCounterMode(display=False) as found:
        model(ids)
    assert 1 < found.get_total_flops() / expected.get_total_flops() < 1.3
