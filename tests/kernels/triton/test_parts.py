"""A part of a 4-bit weight and of x, as with tensor parallelism."""

import pytest
import torch

from lightning_qlora.kernels import reference
from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.triton.dequantize import dequantize
from lightning_qlora.kernels.triton.matmul import can_add_matmul
from lightning_qlora.kernels.verify import part_of
from tests.kernels.forward import forward
from tests.kernels.triton.test_linear import DTYPES, assert_near, layer

PARTS = [(48, 0, 48, 640), (0, 320, 96, 320), (3, 128, 7, 192)]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("block_size", [32, 64])
def test_decodes_to_the_part_of_the_whole(part, block_size):
    weight = reference.quantize(torch.randn(96, 640), "nf4", block_size, True)
    cut = part_of(weight, *part)
    row, column, m, n = part
    expected = reference.dequantize(weight, torch.float32)[row : row + m, column : column + n]
    assert torch.equal(dequantize(cut, torch.float32), expected)
    shifted = cut._replace(
        packed=torch.cat([cut.packed.new_zeros(1), cut.packed.view(-1)])[1:]
    )  # single bytes are read
    assert torch.equal(dequantize(shifted, torch.float32), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [4, 80])  # W is decoded inside the product, or before it
def test_a_layer_forward_and_backward(dtype, m):
    weight, x, grad, _, lora_a, lora_b = layer(48, 640, 8, dtype, m)
    weight, x, lora_a = part_of(weight, 0, 320, 48, 320), x[:, 320:].contiguous(), lora_a[:, 320:].contiguous()
    assert can_add_matmul(x, weight) == (m == 4 and dtype is not torch.float32)
    choices = (lora_a, lora_b, 0.7, 0.3, torch.tensor([2**40 + 7, 320, 640]))
    y, xa = forward(kernels, x, weight, None, *choices)
    expected, expected_xa = forward(reference, x, weight, None, *choices)
    assert_near(y, expected, dtype)
    assert_near(xa, expected_xa, dtype)
    ours = kernels.linear_backward(grad, x, xa, weight, *choices, True)
    theirs = reference.linear_backward(grad, x, expected_xa, weight, *choices, True)
    for mine, yours in zip(ours, theirs, strict=True):
        assert_near(mine, yours, dtype)
