import pytest
import torch

from lightning_qlora.kernels import backends, ops, reference
from lightning_qlora.kernels.triton.dequantize import dequantize, dequantize_into
from lightning_qlora.quantize.packed import PackedBytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Whole runs, a program more and less, a tail inside a block, inside a word, inside a byte; a single weight.
SHAPES = [(64, 64), (65, 64), (40, 96), (3, 100), (7, 36), (5, 7), (1, 1), (129, 65)]


def weight(shape, quant_type="nf4", block_size=64, double_quant=True, seed=0) -> PackedBytes:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    return reference.quantize(values, quant_type, block_size, double_quant)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference_bit_for_bit(shape, dtype):
    packed = weight(shape)
    assert torch.equal(dequantize(packed, dtype), reference.dequantize(packed, dtype))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_every_format_and_block_size(quant_type, double_quant, block_size):
    packed = weight((67, 130), quant_type, block_size, double_quant)
    assert torch.equal(dequantize(packed, torch.float32), reference.dequantize(packed, torch.float32))


def test_nothing_is_written_past_the_end():
    for shape in SHAPES:
        packed = weight(shape)
        memory = torch.full((packed.numel + 64,), 7.0)
        dequantize_into(memory[: packed.numel], packed)
        assert (memory[packed.numel :] == 7).all()


def test_bytes_that_begin_anywhere_and_have_any_shape():
    """FSDP cuts its flat buffers where it likes, and shapes parameters [out_features, ...]."""
    packed = weight((64, 128))
    for offset in range(1, 5):
        moved = torch.cat([packed.packed.new_zeros(offset), packed.packed.view(-1)])[offset:].view(64, 64)
        shifted = packed._replace(packed=moved, absmax=packed.absmax.view(64, 2))
        assert torch.equal(dequantize(shifted, torch.bfloat16), reference.dequantize(packed, torch.bfloat16))


def test_through_the_op_table():
    packed = weight((33, 64))
    assert backends.backend(torch.device("cpu")).__name__ == "lightning_qlora.kernels.triton"
    assert torch.equal(ops.dequantize(packed, torch.float16), reference.dequantize(packed, torch.float16))
