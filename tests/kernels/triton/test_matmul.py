import pytest
import torch

from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.kernels import reference
from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.triton import launch
from lightning_qlora.kernels.triton.linear import add_matmul_
from tests.conftest import every_pair
from tests.kernels.forward import forward
from tests.kernels.triton.test_linear import assert_near, layer

HALVES = [torch.bfloat16, torch.float16]
SHAPES = [(64, 64), (7, 128), (100, 576)]


@pytest.mark.parametrize(("dtype", "m", "shape"), every_pair(HALVES, [1, 16, 17, 64], SHAPES))
def test_adds_the_product(dtype, m, shape):
    rows = shape[0]
    weight, x, _, bias, _, _ = layer(*shape, 4, dtype, m)
    y = torch.randn(m, rows).to(dtype)
    expected = y.double() + x.double() @ reference.dequantize(weight, torch.float32).double().T
    assert_near(add_matmul_(y.clone(), x, weight).double(), expected, dtype)
    assert_near(add_matmul_(y.clone(), x, weight, bias).double(), expected + bias.double(), dtype)


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "block_size"), every_pair(QUANT_TYPES, [True, False], [32, 64, 256, 4096])
)
def test_every_format_and_block_size(quant_type, double_quant, block_size):
    """Also blocks that cross rows: 192 columns are no whole number of blocks of 256."""
    weight, x, _, _, _, _ = layer(40, 192, 4, torch.float16, 5, quant_type, block_size, double_quant)
    expected = x.double() @ reference.dequantize(weight, torch.float32).double().T
    assert_near(add_matmul_(torch.zeros(5, 40, dtype=x.dtype), x, weight).double(), expected, torch.float16)


def test_shares_give_the_same_bits_every_time_and_nothing_past_the_end(monkeypatch):
    monkeypatch.setitem(launch.TABLE, "matmul", {"default": [launch.Tile(M=16, N=64, PROGRAMS=64, num_warps=4)]})
    weight, x, _, _, _, _ = layer(130, 1024, 4, torch.bfloat16, 20)  # three tiles times two
    memory = torch.zeros(20 * 130 + 50, dtype=x.dtype)
    first = add_matmul_(memory[:2600].view(20, 130), x, weight).clone()
    assert (memory[2600:] == 0).all()
    assert torch.equal(add_matmul_(torch.zeros_like(first), x, weight), first)
    assert_near(first, x @ reference.dequantize(weight, x.dtype).T, x.dtype)


def test_no_rows_at_all():
    weight, x, grad, bias, lora_a, lora_b = layer(96, 256, 8, torch.bfloat16, m=0)
    choices = (lora_a, lora_b, 0.7, 0.3, torch.tensor([5]))
    y, xa = forward(kernels, x, weight, bias, *choices)
    assert (y.shape, xa.shape) == ((0, 96), (0, 8))
    grad_x, grad_a, grad_b = kernels.linear_backward(grad, x, xa, weight, LoRA(*choices), True)
    assert grad_x.shape == (0, 256)
    assert not grad_a.any() and not grad_b.any()
