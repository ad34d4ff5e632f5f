"""A new kind of layer is one row of the table, or computes what nn.Linear does with its weight and bias."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_qlora import QLoRALinear, convert, load_adapter, merge, save_adapter
from lightning_qlora.layers.kinds import KINDS, LayerKind, is_linear, sizes_of
from tests.twin import dense_twin


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


class Like(nn.Module):
    """As the linear layers of PyTorch Geometric: names of sizes, entries, a copy from a call of the class."""

    def __init__(self, inputs=64, outputs=48, bias=True):
        super().__init__()
        self.in_channels, self.out_channels = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / 8)
        self.register_parameter("bias", nn.Parameter(torch.randn(outputs)) if bias else None)

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for key, value in (("weight", self.weight), ("bias", self.bias)):
            if value is not None:
                destination[prefix + key] = value if keep_vars else value.detach()

    def __deepcopy__(self, memo):
        again = type(self)(self.in_channels, self.out_channels, self.bias is not None)
        again.load_state_dict(self.state_dict())
        return again

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@pytest.fixture(autouse=True)
def row(monkeypatch):
    """Like is the class of PyTorch Geometric."""
    monkeypatch.setitem(KINDS, f"{__name__}.Like", KINDS["torch_geometric.nn.dense.linear.Linear"])


def test_other_classes_are_no_linear_layers():
    assert is_linear(Like()) and sizes_of(Like()) == (48, 64)
    assert not any(map(is_linear, (nn.Embedding(64, 64), nn.Bilinear(8, 8, 64))))


@pytest.mark.parametrize("make", [Like, lambda: Like(bias=False)])
def test_such_layers_are_converted_trained_copied_saved_and_merged(make, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), make())
    plain = copy.deepcopy(module)
    report = convert(module, r=4, lora_dropout=0.0)
    assert (
        report.converted == ["0", "1"] and isinstance(module[1], QLoRALinear) and isinstance(module[1], type(plain[1]))
    )
    with torch.no_grad():
        module[1].lora_B.normal_()
    x = torch.randn(3, 64)
    twin = dense_twin(module, copy.deepcopy(plain))
    torch.testing.assert_close(module(x), twin(x))
    module(x).square().sum().backward()
    twin(x).square().sum().backward()
    gradients = [layer.parametrizations.weight[0].lora_A.grad for layer in twin]
    torch.testing.assert_close([layer.lora_A.grad for layer in module], gradients, rtol=1e-3, atol=1e-3)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for again in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), module(x)) and isinstance(again[1], QLoRALinear)
    save_adapter(module, tmp_path / "folder")
    loaded = copy.deepcopy(plain)
    convert(loaded, adapter=str(tmp_path / "folder"))
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    load_adapter(loaded, tmp_path / "folder")
    assert not any(key.startswith("1.weight") for key in module.state_dict())
    for parts in ((module, loaded), (module[1], loaded[1])):  # of a part with its base
        with torch.no_grad():
            loaded[1].lora_B.zero_()
        parts[1].load_state_dict(parts[0].state_dict())
        assert torch.equal(loaded(x), module(x))
    expected = module(x)
    assert type(merge(module)[1]) is type(plain[1])
    torch.testing.assert_close(module(x), expected)
