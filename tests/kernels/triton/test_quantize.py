import pytest
import torch

from benchmarks.products import add_matmul_
from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.kernels import backends, ops, reference
from lightning_qlora.kernels.triton.quantize import dequantize, dequantize_into, quantize
from tests.conftest import every_pair
from tests.kernels.triton.test_linear import DTYPES

BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def weight(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


def assert_equal(ours, theirs):
    for one, other in zip(ours[:3], theirs[:3], strict=True):
        assert torch.equal(one, other)
    assert ours[3:] == theirs[3:]


def assert_like_the_reference(values, quant_type="nf4", block_size=64, double_quant=True):
    """Byte for byte, and decoded bit for bit."""
    packed = quantize(values, quant_type, block_size, double_quant)
    assert_equal(packed, reference.quantize(values, quant_type, block_size, double_quant))
    assert torch.equal(dequantize(packed, torch.float32), reference.dequantize(packed, torch.float32))


SHAPES = [(64, 64), (129, 130), (5, 7), (1, 1), (3, 21), (400, 96)]


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "shape", "dtype"), every_pair(QUANT_TYPES, [True, False], SHAPES, DTYPES)
)
def test_every_shape_and_type(quant_type, double_quant, shape, dtype):
    assert_like_the_reference(weight(*shape).to(dtype), quant_type, 64, double_quant)


@pytest.mark.parametrize(
    ("quant_type", "double_quant", "block_size"), every_pair(QUANT_TYPES, [True, False], BLOCK_SIZES)
)
def test_every_format_and_block_size(quant_type, double_quant, block_size):
    assert_like_the_reference(weight(67, 131), quant_type, block_size, double_quant)


@pytest.mark.parametrize("double_quant", [True, False])
def test_zeros_constants_ties_and_extremes(double_quant):
    levels = reference.codebook("nf4")
    for values in (
        torch.zeros(4, 64),
        torch.full((4, 64), 0.5),
        torch.cat([levels.bounds, levels.levels, levels.bounds.new_tensor([1e-30])]).repeat(4).view(4, -1),
        torch.full((2, 70), 1e-39),
        torch.randn(4, 64) * 1e37,
        torch.cat([torch.zeros(4, 64), torch.randn(4, 64)]),
    ):
        for quant_type in QUANT_TYPES:
            theirs = reference.quantize(values, quant_type, 64, double_quant)
            assert_equal(quantize(values, quant_type, 64, double_quant), theirs)


# Whole runs, a program more and less, a tail inside a block, inside a word, inside a byte; a single weight.
DECODED = [(64, 64), (65, 64), (40, 96), (3, 100), (7, 36), (5, 7), (1, 1), (129, 65)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DECODED)
def test_decoding_ends_with_the_weight(shape, dtype):
    packed = reference.quantize(weight(*shape), "nf4", 64, True)
    memory = torch.full((packed.numel + 64,), 7.0, dtype=dtype)
    dequantize_into(memory[: packed.numel], packed)
    assert torch.equal(memory[: packed.numel].view(shape), reference.dequantize(packed, dtype))
    assert (memory[packed.numel :] == 7).all()


@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_that_begin_anywhere_and_have_any_shape(double_quant):
    """FSDP cuts its flat buffers at any byte, and parameters have the shape [out_features, ...]."""
    packed = reference.quantize(weight(64, 128), "nf4", 64, double_quant)
    expected = reference.dequantize(packed, torch.bfloat16)
    for offset in (1, 2, 4):
        parts = [torch.cat([part.new_zeros(offset), part.view(-1)])[offset:] for part in packed[:3]]
        shifted = packed._replace(packed=parts[0].view(64, 64), absmax=parts[1].view(64, -1), nested=parts[2])
        assert torch.equal(dequantize(shifted, torch.bfloat16), expected)
        x = torch.randn(3, 128).bfloat16()
        product = add_matmul_(torch.zeros(3, 64, dtype=x.dtype), x, packed)
        assert torch.equal(add_matmul_(torch.zeros_like(product), x, shifted), product)


def test_strided_weights_and_decoding_through_the_op_table():
    assert backends.describe(torch.device("cpu")) == "Triton kernels"
    values = weight(48, 80).T
    ours = ops.quantize(values).to_bytes()
    theirs = reference.quantize(values, "nf4", 64, True)
    assert_equal(ours._replace(packed=ours.packed.view(-1)), theirs)
    assert torch.equal(ops.dequantize(theirs, torch.float16), reference.dequantize(theirs, torch.float16))
