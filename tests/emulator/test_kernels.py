"""The self-check of a card (`kernels/verify.py`) with the kernels as compiled code: every op against the reference."""

import pytest
import torch

pytest.importorskip("triton")

from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels import verify
from lightning_qlora.kernels.half import Half
from tests.emulator import amd
from tests.emulator.driver import emulated
from tests.toys import needs

CPU = torch.device("cpu")
OTHERS = ("sm_75", "sm_89", "sm_90", "sm_120")  # no product in Triton, the tiles of 99 KiB, wgmma, f32x2 and stmatrix
# sm_90: both factors of wgmma in shared memory, one in registers, both transposed, of several experts.
HOPPER = (("lora_project", 3), ("linear_into", 2), ("linear_backward", 1), ("grouped_linear", 1))
# sm_75: to fp16 with a power of two; the sum of two products, with and without dropout, whose products are torch's.
TURING = (("to_half", 0), ("lora_project", 6), ("linear_into", 6), ("linear_into", 7), ("linear_backward", 6))
ROWS = 100  # cases with more take half of the time


def rows(arguments):
    matrices = [each.values if isinstance(each, Half) else each for each in arguments]
    return max(matrix.shape[0] for matrix in matrices if isinstance(matrix, torch.Tensor) and matrix.dim() == 2)


def is_large(op, arguments):
    return not op.startswith(("quant", "dequant", "to_half", "adamw")) and rows(arguments) > ROWS


def fault(target, op, number):
    """What a case does wrong on a target. PTX runs twice: the second launch is the short path of `triton/launch.py`."""
    arguments = list(verify.cases(op))[number]
    with emulated(target) as emulation:
        for _ in range(1 if target in amd.TARGETS else 2):
            memory = []
            emulation.reachable = lambda memory=memory: [whole[verify.BORDER : -verify.BORDER] for whole in memory]
            if found := verify.fault_in(arguments, kernels, CPU, op, memory):
                return found
    return None


@needs("triton", "3.9", "the emulator knows its PTX")
@pytest.mark.parametrize("op", verify.OPS)
def test_ptx_for_sm_80(op):
    for number, arguments in enumerate(verify.cases(op)):
        if not is_large(op, arguments):
            assert fault("sm_80", op, number) is None


@needs("triton", "3.9", "the emulator knows its PTX")
@pytest.mark.parametrize(("op", "number"), HOPPER)
def test_products_of_hopper(op, number):
    assert fault("sm_90", op, number) is None


@needs("triton", "3.9", "the emulator knows its PTX")
@pytest.mark.parametrize(("op", "number"), TURING)
def test_products_of_turing(op, number):
    assert fault("sm_75", op, number) is None


@pytest.mark.slow
@needs("triton", "3.9", "the emulator knows its PTX")
@pytest.mark.parametrize("op", verify.OPS)
@pytest.mark.parametrize("target", ["sm_80", *OTHERS, *amd.targets()])
def test_all_cases(target, op):
    for number, arguments in enumerate(verify.cases(op)):
        if target != "sm_80" or is_large(op, arguments):
            assert fault(target, op, number) is None
