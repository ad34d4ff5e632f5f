"""docs/one-file.md, QLoRA in plain torch and Lightning, computes what the package computes."""

from types import ModuleType

import pytest
import torch

import lightning_qlora
from lightning_qlora import QLoRAPrecision
from lightning_qlora.layers.qlora_linear import adapted_layers
from tests.conftest import ROOT, Classifier, loader
from tests.scripts.doc_blocks import blocks

ARGUMENTS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def one_file():
    """The module that the page shows."""
    [code] = [block.code for block in blocks(ROOT / "docs" / "one-file.md") if block.title]
    module = ModuleType("one_file")
    exec(compile(code, "one_file.py", "exec"), vars(module))
    return module


@pytest.fixture
def pair(one_file):
    """A module converted by the file and one converted by the package, with the same adapters; no B is zero."""
    small = one_file.SmallQLoRA(**ARGUMENTS).convert_module(Classifier())
    package = Classifier()
    lightning_qlora.convert(package, **ARGUMENTS)
    for name, layer in adapted_layers(package).items():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        for key in ("lora_A", "lora_B"):
            small.get_submodule(name).get_parameter(key).data.copy_(getattr(layer, key))
    return small, package


@pytest.mark.parametrize("shape", [(64, 64), (512, 768)])
def test_bytes_and_decoded_weights_are_equal(one_file, shape):
    weight = torch.randn(shape)
    packed, scale_codes, nested, mean = parts = one_file.quantize(weight)
    expected = lightning_qlora.quantize(weight)
    assert torch.equal(packed, expected.packed.flatten())
    assert torch.equal(scale_codes, expected.absmax.flatten())
    assert torch.equal(nested, expected.nested_absmax)
    assert mean.item() == expected.offset
    assert torch.equal(one_file.dequantize(*parts).view(shape), expected.dequantize(torch.float32))


def test_outputs_and_gradients_are_equal(pair):
    small, package = pair
    x = torch.randn(8, 64)
    torch.testing.assert_close(small(x), package(x))
    for module in pair:
        module(x).square().sum().backward()
    gradients = {name: p.grad for name, p in package.named_parameters() if p.requires_grad}
    assert gradients.keys() == {name for name, p in small.named_parameters() if p.requires_grad}
    for name, gradient in gradients.items():
        torch.testing.assert_close(small.get_parameter(name).grad, gradient)


def test_training_losses_are_equal(one_file, pair, trainer):
    small, package = pair
    trainer(plugins=one_file.SmallQLoRA(**ARGUMENTS)).fit(small, loader())
    trainer(plugins=QLoRAPrecision(**ARGUMENTS)).fit(package, loader())
    assert len(package.losses) == 4
    assert small.losses == pytest.approx(package.losses, rel=1e-4)
    assert package.losses[-1] != package.losses[0]
