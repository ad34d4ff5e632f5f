"""The self-check of a card (`kernels/verify.py`) with the kernels as compiled code: every op against the reference."""

from itertools import islice

import pytest
import torch

pytest.importorskip("triton")

from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.half import rows_to_half
from lightning_qlora.kernels.triton import launch
from tests.emulator import amd
from tests.emulator.driver import emulated
from tests.kernels import verify
from tests.toys import needs

CPU = torch.device("cpu")
OTHERS = ("sm_75", "sm_89", "sm_90", "sm_120")  # no product in Triton, the tiles of 99 KiB, wgmma, f32x2 and stmatrix
# Cases of each op that `make test` executes.
FIRST = {
    "sm_80": {
        "quantize": (0, 2, 3, 4),
        "dequantize": (0, 1, 2, 3),
        "rows_to_half": (0,),
        "lora_project": (0, 1, 2, 11),
        "linear_into": (0, 1, 2, 7, 10),
        "linear_backward": (0, 1, 7),
        "grouped_linear": (1, 2),
        "grouped_linear_backward": (1, 3),
    },
    # Both factors of wgmma in shared memory, one in registers, both transposed, of several experts.
    "sm_90": {"lora_project": (3,), "linear_into": (2,), "linear_backward": (1,), "grouped_linear": (1,)},
    "sm_120": {"linear_into": (2,)},  # f32x2 and add.f32.bf16
    # To fp16 with powers of two; what follows torch's products, with and without dropout; then one row and two.
    "sm_75": {
        "rows_to_half": (0, 1),
        "take_out": (0, 1),
        "lora_project": (6,),
        "linear_into": (6, 7, 8, 9),
        "linear_backward": (6,),
    },
}
pytestmark = needs("triton", "3.7", "the emulator knows its PTX")


def fault(target, op, number):
    """What a case does wrong on a target. PTX runs twice: the second launch is the short path of `triton/launch.py`."""
    arguments = next(islice(verify.cases(op), number, None))
    with emulated(target) as emulation:
        function = verify.function_of(kernels, op)
        for _ in range(1 if target in amd.TARGETS else 2):
            memory = []
            emulation.reachable = lambda memory=memory: [whole[verify.BORDER : -verify.BORDER] for whole in memory]
            if found := verify.fault_in(arguments, kernels, CPU, op, memory, function):
                return found
    return None


@pytest.mark.parametrize(
    ("target", "op", "number"),
    [(target, op, number) for target, cases in FIRST.items() for op, numbers in cases.items() for number in numbers],
)
def test_a_case_of_each_kernel(target, op, number):
    assert fault(target, op, number) is None


@pytest.mark.parametrize("op", ["lora_project", "linear_into", "linear_backward"])
def test_ranks_of_two_tiles_and_gradients_that_programs_share(op, monkeypatch):
    """As in the largest case, which takes long."""
    tile = launch.Tile(M=16, N=64, num_warps=4, num_stages=2)
    monkeypatch.setitem(launch.TABLE, "lora_gradients", {"default": [tile]})
    monkeypatch.setattr(launch, "PROGRAMS", 64)
    monkeypatch.setattr(verify, "LAYERS", ((130, 66, 96, 70, 32, False, 0.3, True),))
    assert fault("sm_80", op, 1) is None


def test_a_matrix_without_elements():
    with emulated("sm_80"):
        ours = kernels.rows_to_half(torch.empty(0, 4))
    theirs = rows_to_half(torch.empty(0, 4))
    assert torch.equal(ours.values, theirs.values) and torch.equal(ours.factor, theirs.factor)


@pytest.mark.slow
@pytest.mark.parametrize("op", verify.OPS)
@pytest.mark.parametrize("target", ["sm_80", *OTHERS, *amd.targets()])
def test_all_cases(target, op):
    for number, _ in enumerate(verify.cases(op)):
        if number not in FIRST.get(target, {}).get(op, ()):
            assert fault(target, op, number) is None, number
