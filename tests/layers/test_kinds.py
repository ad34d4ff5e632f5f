"""Layers of other classes are linear if they compute what nn.Linear does with their weight and bias."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_qlora import QLoRALinear, convert, load_adapter, merge, save_adapter
from lightning_qlora.layers.kinds import is_linear, sizes_of
from tests.twin import dense_twin


class Like(nn.Module):
    """As the linear layers of PyTorch Geometric: other names of its sizes, and a copy from a call of the class."""

    def __init__(self, inputs=64, outputs=48, bias=True):
        super().__init__()
        self.in_channels, self.out_channels = inputs, outputs
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / 8)
        self.register_parameter("bias", nn.Parameter(torch.randn(outputs)) if bias else None)

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def __deepcopy__(self, memo):
        again = type(self)(self.in_channels, self.out_channels, self.bias is not None)
        again.load_state_dict(self.state_dict())
        return again

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class WithoutBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x):
        return x @ self.weight.T


class Scaled(WithoutBias):
    def forward(self, x):
        return 1.05 * super().forward(x)


class Cosines(WithoutBias):
    def forward(self, x):
        return F.normalize(x) @ F.normalize(self.weight).T


class Dropped(Like):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5, self.training))


class Pair(Like):
    def forward(self, x):
        return super().forward(x), self.bias


class Called(WithoutBias):
    """Its calls are counted, and its width can't be set."""

    calls = 0
    in_features = property(lambda self: 64)

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("layer", "linear"),
    [
        (Like(), True),
        (Like(bias=False).bfloat16(), True),
        (WithoutBias(), True),
        (Scaled(), False),
        (Cosines(), False),
        (Dropped(), False),
        (Pair(), False),
        (nn.Embedding(64, 64), False),
        (nn.Bilinear(8, 8, 64), False),
        (Like().to("meta"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_one_call_tells_whether_a_layer_is_linear(layer, linear):
    state = torch.get_rng_state()
    assert is_linear(layer) is linear
    assert torch.equal(state, torch.get_rng_state())
    if linear:
        assert sizes_of(layer) == tuple(layer.weight.shape)


@pytest.mark.parametrize("make", [Like, WithoutBias, lambda: Like(bias=False)])
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
    expected = module(x)
    assert type(merge(module)[1]) is type(plain[1])
    torch.testing.assert_close(module(x), expected)


def test_a_layer_whose_names_a_4_bit_layer_needs_stays_dense_with_the_reason():
    module = nn.Sequential(nn.Linear(64, 64), Called())
    report = convert(module, r=4)
    assert report.skipped == {"1": "Called has a in_features of its own, which a 4-bit layer would replace"}
    assert report.converted == ["0"]
