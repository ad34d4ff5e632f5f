import pytest
import torch

from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.kernels import backends, ops, reference
from lightning_qlora.kernels.triton.linear import add_matmul_
from lightning_qlora.kernels.triton.quantize import dequantize, dequantize_into
from lightning_qlora.quantization.packed_weight import PackedBytes
from tests.conftest import every_pair

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole runs, a program more and less, a tail inside a block, inside a word, inside a byte; a single weight.
SHAPES = [(64, 64), (65, 64), (40, 96), (3, 100), (7, 36), (5, 7), (1, 1), (129, 65)]


def weight(shape, quant_type="nf4", block_size=64, double_quant=True, seed=0) -> PackedBytes:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    return reference.quantize(values, quant_type, block_size, double_quant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference_bit_for_bit_and_ends_with_the_weight(shape, dtype):
    packed = weight(shape)
    memory = torch.full((packed.numel + 64,), 7.0, dtype=dtype)
    dequantize_into(memory[: packed.numel], packed)
    assert torch.equal(memory[: packed.numel].view(shape), reference.dequantize(packed, dtype))
    assert (memory[packed.numel :] == 7).all()


BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "block_size"), every_pair(QUANT_TYPES, [True, False], BLOCK_SIZES)
)
def test_every_format_and_block_size(quant_type, double_quant, block_size):
    packed = weight((67, 130), quant_type, block_size, double_quant)
    assert torch.equal(dequantize(packed, torch.float32), reference.dequantize(packed, torch.float32))


@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_that_begin_anywhere_and_have_any_shape(double_quant):
    """FSDP cuts its flat buffers at any byte, and parameters have the shape [out_features, ...]."""
    packed = weight((64, 128), double_quant=double_quant)
    expected = reference.dequantize(packed, torch.bfloat16)
    for offset in (1, 2, 4):
        parts = [torch.cat([part.new_zeros(offset), part.view(-1)])[offset:] for part in packed[:3]]
        shifted = PackedBytes(parts[0].view(64, 64), parts[1].view(64, -1), parts[2], *packed[3:])
        assert torch.equal(dequantize(shifted, torch.bfloat16), expected)
        x = torch.randn(3, 128).bfloat16()
        product = add_matmul_(torch.zeros(3, 64, dtype=x.dtype), x, packed)
        assert torch.equal(add_matmul_(torch.zeros_like(product), x, shifted), product)


def test_through_the_op_table():
    packed = weight((33, 64))
    assert backends.describe(torch.device("cpu")) == "Triton kernels"
    assert torch.equal(ops.dequantize(packed, torch.float16), reference.dequantize(packed, torch.float16))
