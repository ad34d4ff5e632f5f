"""A part of a 4-bit weight, as a rank holds it with tensor parallelism, and the dropout mask of a part of x."""

import pytest
import torch

from lightning_qlora.kernels import eager, ops, reference
from lightning_qlora.kernels.cpu.library import compiled_library
from lightning_qlora.kernels.lora_linear import lora_linear
from lightning_qlora.kernels.verify import part_of

# Rows and columns of W, block size; then the part: whole rows, columns of all rows, neither. 256 scales are no row.
WHOLE = [(96, 1280, 64), (130, 768, 32)]
PARTS = [(48, 0, 48, 640), (0, 640, 96, 128), (3, 128, 7, 384)]


@pytest.fixture
def library():
    return compiled_library() or pytest.skip("no C kernels")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("rows", "columns", "size"), WHOLE)
def test_decodes_to_the_part_of_the_whole_everywhere(rows, columns, size, part, library):
    weight = reference.quantize(torch.randn(rows, columns), "nf4", size, True)
    row, column, m, n = part
    expected, cut = (
        reference.dequantize(weight, torch.float32)[row : row + m, column : column + n],
        part_of(weight, *part),
    )
    assert torch.equal(reference.dequantize(cut, torch.float32), expected)
    assert torch.equal(ops.dequantize(cut, torch.bfloat16), expected.bfloat16())
    assert torch.equal(cut.dequantize_into(torch.empty(m * n)).view(m, n), expected)
    x = torch.randn(3, n)
    if library.multiplies(3, cut, x.dtype):
        torch.testing.assert_close(library.add_matmul(torch.zeros(3, m), x, cut), x @ expected.T, atol=1e-4, rtol=1e-4)
    if library.multiplies(3, cut, torch.bfloat16):
        y = library.add_matmul(torch.zeros(3, m, dtype=torch.bfloat16), x.bfloat16(), cut)
        torch.testing.assert_close(y.float(), x.bfloat16().float() @ expected.bfloat16().float().T, atol=0.3, rtol=2e-2)


@pytest.mark.parametrize(("column", "width"), [(0, 640), (640, 640), (320, 77)])
def test_the_mask_of_a_part_of_the_columns_is_the_part_of_the_mask(column, width, library):
    x, number = torch.randn(33, 1280), 2**61 - 5  # the first column added to the low half overflows it
    expected = reference.dropout(x, 0.3, torch.tensor([number]))[:, column : column + width]
    part, seed = x[:, column : column + width].contiguous(), torch.tensor([number, column, 1280])
    assert torch.equal(reference.dropout(part, 0.3, seed), expected)
    for dropout_into in (library.dropout_into, eager.dropout_in_chunks):
        assert torch.equal(dropout_into(torch.empty_like(part), part, 0.3, seed), expected)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_layers_of_two_halves_add_up_with_gradients(compiled):
    """By inputs; the op inside torch.compile has the part among its arguments."""
    weight, x = reference.quantize(torch.randn(48, 256), "nf4", 64, True), torch.randn(5, 256, requires_grad=True)
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((4, 256), (48, 4)))
    function = torch.compile(lora_linear, backend="aot_eager", fullgraph=True) if compiled else lora_linear
    whole = lora_linear(x, weight, None, a, b, 0.5, 0.3, torch.tensor([7]))
    halves = [
        function(
            x[:, first : first + 128], part_of(weight, 0, first, 48, 128), None, a[:, first : first + 128], b, 0.5, 0.3,
            torch.tensor([7, first, 256]),
        )
        for first in (0, 128)
    ]  # fmt: skip
    torch.testing.assert_close(halves[0] + halves[1], whole, atol=1e-4, rtol=1e-4)
    grad = torch.randn_like(whole)
    for ours, theirs in zip(*(torch.autograd.grad(y, (x, a, b), grad) for y in (sum(halves), whole)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_part_that_is_not_of_whole_blocks_or_not_inside_is_refused():
    """The kernels read scales by address."""
    weight = reference.quantize(torch.randn(8, 256), "nf4", 64, True)
    good = part_of(weight, 2, 64, 4, 128)
    for part in ((2, 32, 8, 256), (5, 64, 8, 256), (2, 192, 8, 256), (-1, 64, 8, 256)):
        with pytest.raises(ValueError, match="is no part of whole blocks"):
            ops.dequantize(good._replace(part=good.part._make(part)), torch.float32)
    with pytest.raises(ValueError, match=r"and 12 of second-level scales"):
        ops.dequantize(good._replace(part=good.part._make((2, 64, 128, 256))), torch.float32)
