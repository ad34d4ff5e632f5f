"""A small adapter's part arrives in y and dX in full, on average: nothing large is rounded before it is in."""

import pytest
import torch
from torch import nn

from lightning_qlora import convert
from lightning_qlora.kernels import eager, reference
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.kernels.self_test import function_of
from lightning_qlora.layers.dora import dora_scale
from tests.conftest import every_pair
from tests.kernels.forward import forward
from tests.kernels.shares import experts, share, shares

HALVES = [torch.bfloat16, torch.float16]


def op(function):
    """The op with its gradient, as a layer calls it."""

    def layer(x, weight, bias, a, b, scaling, grad):
        x = x.clone().requires_grad_()
        y = function(x, weight, bias, LoRA(a, b, scaling))
        return y.detach(), torch.autograd.grad(y, x, grad)[0]

    return layer


def backend(kernels):
    def layer(x, weight, bias, a, b, scaling, grad):
        y, xa = forward(kernels, x, weight, bias, a, b, scaling)
        return y, function_of(kernels, "linear_backward")(grad, x, xa, weight, LoRA(a, b, scaling), True)[0]

    return layer


LAYERS = {
    "reference": backend(reference),
    "eager": backend(eager),
    "op": op(lora_linear),
    "compiled": op(torch.compile(lora_linear, backend="aot_eager", dynamic=False)),
}


@pytest.fixture(autouse=True)
def _compiled_anew():
    """torch compiles a function for at most eight shapes and types."""
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("layer", "rows", "bias", "dtype"), every_pair([*LAYERS], [16, 256], [None, 8.0], HALVES))
def test_the_share_of_a_small_adapter(layer, rows, bias, dtype):
    """With few rows several layers count together: the noise of one is larger than the bound."""
    repeats = max(1, 1024 // rows) * (4 if bias == 8 and dtype is torch.bfloat16 else 1)
    if layer == "compiled":
        repeats = min(repeats, 32)
    found = shares(LAYERS[layer], rows, 512, 512, dtype, bias, repeats)
    assert found == pytest.approx([1, 1], abs=0.1)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_share_of_experts(dtype):
    assert shares(experts(reference, [300, 512]), 512, 512, 512, dtype) == pytest.approx([1, 1], abs=0.1)


BLOCKS = [(512, 64), (96, 64), (720, 64), (512, 1024)]


@pytest.mark.parametrize(("blocks", "change", "dtype"), every_pair(BLOCKS, [1e-4, 1e-3], HALVES))
def test_the_share_of_a_change_of_doras_magnitudes(change, blocks, dtype):
    """Blocks within rows, blocks that are split at rows, and rows that consist of no blocks of 32."""
    inputs, block_size = blocks
    changes = ([], [])
    expected = ([], [])
    for seed in range(6 if dtype is torch.bfloat16 else 2):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(inputs, 1536, dtype=dtype))
        convert(net, r=8, lora_dropout=0.0, use_dora=True, block_size=block_size)
        layer = net[0]
        x = torch.randn(64, inputs).to(dtype).requires_grad_()
        grad = torch.randn(64, 1536).to(dtype)
        # Magnitudes that have trained: at the first step the largest weight of each block is near a number of bf16.
        layer.lora_magnitude_vector.data *= 1 + 0.02 * torch.randn(1536)
        factors = change * torch.randn(1536).sign()
        results = []
        for factor in (0.0, factors):
            with torch.no_grad():
                kept = layer.lora_magnitude_vector.clone()
                layer.lora_magnitude_vector.mul_(1 + factor)
            y = layer(x)
            results.append((y.detach().double(), torch.autograd.grad(y, x, grad)[0].double()))
            layer.lora_magnitude_vector.data.copy_(kept)
        moved = (dora_scale(layer, layer.matrices()[0]).detach() * factors)[:, None].double() * layer.decode().double()
        for found, new, old in zip(changes, *reversed(results), strict=True):
            found.append(new - old)
        expected[0].append(x.detach().double() @ moved.T)
        expected[1].append(grad.double() @ moved)
    found = [share(torch.cat(a), torch.cat(b)) for a, b in zip(changes, expected, strict=True)]
    assert found == pytest.approx([1, 1], abs=0.1)
