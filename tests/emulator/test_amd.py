"""What is true of AMD's machine code alone. The kernels, bugs and barriers are in the other files, for all targets."""

import pytest
import torch

pytest.importorskip("triton")

from lightning_qlora.kernels import reference, scratch
from lightning_qlora.kernels.triton.linear import add_matmul_
from tests.emulator import amd
from tests.emulator.driver import emulated
from tests.emulator.machine import UnknownInstruction
from tests.emulator.memory import Fault
from tests.emulator.test_mutations import S_NOP, orders
from tests.toys import needs

pytestmark = [needs("triton", "3.9", "the emulator knows its code")]
WAIT_FOR_STORES = b"\x00\x00\x7c\xbc"  # s_waitcnt_vscnt null, 0 of RDNA 3


@pytest.fixture
def product():
    """A product of few rows. The sums of several programs are shared, as they are not on AMD."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 512).bfloat16(), reference.quantize(torch.randn(66, 512), "nf4", 64, True)
    scratch.release()

    def compute():
        torch.version.hip = None
        return add_matmul_(torch.zeros(7, 66).bfloat16(), x, weight)

    yield compute, x.float() @ reference.dequantize(weight, torch.float32).T
    scratch.release()


@pytest.mark.parametrize("target", amd.targets("gfx942"))
def test_sums_that_programs_share_race_on_cdna(target, product):
    """As the docstring of `number_of_shares` says: the wave that counts has not waited for the stores of the others.

    They wait for themselves, but after the barrier, so that the count does not release these stores.
    """
    with emulated(target), pytest.raises(Fault, match=r"race: block \d loads what block \d stored, .* not released"):
        product[0]()


@pytest.mark.parametrize("target", amd.targets("gfx1100", "gfx1201"))
def test_sums_that_programs_share_do_not_race_on_rdna(target, product):
    with emulated(target):
        assert (product[0]() - product[1]).abs().max() < 2e-2 * product[1].abs().max()


@pytest.mark.parametrize("target", amd.targets("gfx1100"))
def test_without_waits_for_stores_they_would(target, product):
    with emulated(target) as emulation:
        emulation.change = lambda code: code.replace(WAIT_FOR_STORES, S_NOP)
        with pytest.raises(Fault, match="its warp has not waited for the store"):
            product[0]()


@pytest.mark.parametrize("target", amd.targets())
def test_an_unknown_instruction_is_named(target, product):
    with emulated(target) as emulation:
        emulation.change = lambda code: orders(target, code)[0].re.sub(b"\xff\xff\xff\xff", code)
        with pytest.raises(UnknownInstruction, match=r"AMD instruction is not known: unknown .* word=0xffffffff"):
            product[0]()
