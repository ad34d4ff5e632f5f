import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_qlora import convert, quantize
from lightning_qlora.config import QUANT_TYPES
from lightning_qlora.quantization.blockwise import code_of_place
from lightning_qlora.quantization.codebooks import OF_BITSANDBYTES, codebook, dynamic_map

bnb = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("quant_type", [*OF_BITSANDBYTES, "int4"])
def test_tables_are_those_of_bitsandbytes(quant_type):
    book = codebook(quant_type)
    levels = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7]) / 7  # which it lists for INT4
    if quant_type in OF_BITSANDBYTES:
        levels = bnb.get_4bit_type(quant_type, device="cpu")
    ascending, order = levels.sort(stable=True)
    byte = torch.arange(256)
    assert torch.equal(book.levels, levels)
    assert torch.equal(book.order, order.to(torch.uint8)) and book.order.dtype == torch.uint8
    assert torch.equal(book.bounds, (ascending[:-1] + ascending[1:]) / 2)
    assert torch.equal(book.pairs.view(torch.float32).view(256, 2), levels[torch.stack([byte // 16, byte % 16], 1)])
    assert book.in_order == (quant_type == "nf4")
    *tables, in_order = codebook(quant_type, "meta")
    assert {table.device.type for table in tables} == {"meta"} and in_order == book.in_order


def test_nf4_follows_from_its_formula_to_the_last_bit():
    """Quantiles of the standard normal distribution, eight above zero, seven below, and zero itself.

    Formula: levels = Phi^-1(p) / max, p evenly spaced in probability from 1/2 to 1 - (1/30 + 1/32) / 2
    (QLoRA paper, section 3 and appendix E; bitsandbytes functional.py, create_normal_map).
    """
    outermost = 0.9677083
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, 9)[:-1].double()).float()
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, 8)[:-1].double()).float()
    levels = torch.cat([above, torch.zeros(1), below]).sort().values
    assert torch.equal(levels / levels.max(), codebook("nf4").levels)


def test_dynamic_map_is_that_of_bitsandbytes():
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed=signed))


def test_an_unknown_type_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"quant_type='nf3'.*'nf4', 'fp4', 'int4'"):
        codebook("nf3")


@pytest.mark.parametrize(
    "table",
    [*(lambda t=t: codebook.__wrapped__(t).levels for t in QUANT_TYPES), dynamic_map.__wrapped__],
    ids=[*QUANT_TYPES, "dynamic"],
)
def test_a_default_type_of_float64_changes_no_table(table):
    expected = table()
    torch.set_default_dtype(torch.float64)
    try:
        assert table().dtype == torch.float32 and torch.equal(table(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_tables_and_masks_do_not_follow_a_default_device():
    """Tables are kept for good, and a GPU's linspace may round otherwise; a seed on a GPU would be waited for."""
    layer = nn.Linear(64, 32)
    x = torch.randn(3, 64)
    convert(layer, r=4, lora_dropout=0.5)
    expected = quantize(x)
    for table in (codebook, dynamic_map, code_of_place):
        table.cache_clear()
    with torch.device("meta"):
        assert torch.equal(quantize(x).absmax, expected.absmax)
        assert layer.train()(x).isfinite().all()


@pytest.mark.slow
def test_the_levels_of_scales_are_the_same_on_a_processor_without_fma():
    """torch.linspace differs there in the last bit."""
    code = (
        "import torch; from lightning_qlora.quantization.codebooks import dynamic_map\n"
        "print(torch.cat([dynamic_map(), dynamic_map(False)]).view(torch.int32).tolist())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    levels = torch.cat([dynamic_map(), dynamic_map(False)]).view(torch.int32).tolist()
    assert result.stdout.strip() == str(levels), result.stderr
