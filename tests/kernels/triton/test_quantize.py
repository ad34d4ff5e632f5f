import pytest
import torch

from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.kernels import ops, reference
from lightning_qlora.kernels.triton.quantize import quantize
from tests.conftest import every_pair


def assert_equal(ours, theirs):
    assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(ours.absmax, theirs.absmax)
    assert torch.equal(ours.nested, theirs.nested)
    assert ours[3:] == theirs[3:]


def weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


SHAPES = [(64, 64), (129, 130), (5, 7), (1, 1), (3, 21), (400, 96)]


@pytest.mark.parametrize(("quant_type", "double_quant", "shape"), every_pair(QUANT_TYPES, [True, False], SHAPES))
def test_equals_the_reference_byte_for_byte(quant_type, double_quant, shape):
    values = weight(*shape)
    assert_equal(
        quantize(values, quant_type, 64, double_quant), reference.quantize(values, quant_type, 64, double_quant)
    )


@pytest.mark.parametrize("block_size", [32, 128, 256, 512, 1024, 2048, 4096])
def test_every_block_size(block_size):
    values = weight(33, 131)
    assert_equal(quantize(values, "nf4", block_size, True), reference.quantize(values, "nf4", block_size, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    values = weight(65, 96).to(dtype)
    assert_equal(quantize(values, "nf4", 64, True), reference.quantize(values, "nf4", 64, True))


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
            assert_equal(
                quantize(values, quant_type, 64, double_quant), reference.quantize(values, quant_type, 64, double_quant)
            )


def test_strided_weights_through_the_op_table():
    values = weight(48, 80).T
    ours = ops.quantize(values).to_bytes()
    theirs = reference.quantize(values, "nf4", 64, True)
    assert_equal(ours._replace(packed=ours.packed.view(-1)), theirs)
