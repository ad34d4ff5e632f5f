"""A new kind of layer is one row of the table."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_qlora import QLoRALinear, convert, merge
from lightning_qlora.layers.kinds import KINDS, LayerKind, is_linear


class FusedGelu(nn.Module):
    """gelu(x W + b), with W stored as [in, out] and no names of nn.Linear."""

    def __init__(self, inputs, width):
        super().__init__()
        self.inputs = inputs
        self.width = width
        self.weight = nn.Parameter(torch.randn(inputs, width) / 8)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, hidden):
        return F.gelu(torch.addmm(self.bias, hidden, self.weight))


def test_a_fused_layer_is_converted_trained_copied_and_merged_by_its_row_alone(monkeypatch):
    net = nn.Sequential(FusedGelu(96, 64), nn.Linear(64, 32))
    x = torch.randn(5, 96)
    attributes = set(vars(net[0]))
    keys = list(net.state_dict())
    assert not is_linear(net[0])
    row = LayerKind(True, ("width", "inputs"), lambda self, hidden: F.gelu(self.linear(hidden, self.bias)))
    monkeypatch.setitem(KINDS, f"{__name__}.FusedGelu", row)
    assert convert(net, r=4, lora_dropout=0.0).converted == ["0", "1"]
    layer = net[0]
    assert isinstance(layer, QLoRALinear) and layer.weight.shape == (96, 64)
    layer.lora_B.data.normal_(std=0.1)
    for twin in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(twin[0](hidden=x), F.gelu(x @ layer.weight.detach() + layer.bias))
    net(x).square().mean().backward()
    assert layer.lora_A.grad.any()
    expected = net(x)
    merge(net)
    assert type(net[0]) is FusedGelu
    assert (set(vars(net[0])), list(net.state_dict())) == (attributes, keys)
    torch.testing.assert_close(net(x), expected)


def test_a_weight_in_the_layout_of_bitsandbytes_kernel_for_cpus_is_refused():
    bnb = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu")
    net[0].weight.quant_state.packing_format_for_cpu = True  # as after an eval pass on a CPU with AVX-512 bf16
    with pytest.raises(ValueError, match=r"repacked this weight .* Convert the model before it runs"):
        convert(net, r=4)
