"""Kernels that are broken on purpose: does the emulator notice?"""

import re
import shutil

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.products import add_matmul_, lora_down
from lightning_qlora.kernels import reference, scratch
from lightning_qlora.kernels.triton.quantize import quantize
from tests.conftest import ROOT, run_python
from tests.emulator import amd
from tests.emulator.driver import emulated
from tests.emulator.memory import Fault
from tests.toys import needs

pytestmark = [pytest.mark.slow, needs("triton", "3.7", "the emulator knows its PTX")]
# File of kernels/triton, text, replacement, op and number of the case, what is found.
OUTSIDE = "outside of all tensors"
DIFFERS = "differs from the reference"
PLACE = "place = row.to(tl.int64)[:, None] * %s + column[None, :]\n    if DROP"
BUGS = [
    (
        "quantize",
        "weights.to(out.dtype.element_ty), mask=mask)",
        "weights.to(out.dtype.element_ty))",
        "dequantize",
        2,
        OUTSIDE,
    ),
    ("quantize", "weight // 2, mask=mask, other=0)", "weight // 2)", "dequantize", 2, f"load of 1 bytes {OUTSIDE}"),
    ("quantize", "tl.load(absmax + block, mask=mask, other=0)", "tl.load(absmax + block)", "dequantize", 3, OUTSIDE),
    (
        "matmul",
        "write = (row < n)",
        "write = (row >= 0)",
        "linear_into",
        3,
        f"{OUTSIDE}|race: block 1 loads what block 0",
    ),
    ("lora_products", PLACE % "n", PLACE % "(n + 1)", "linear_into", 3, f"{OUTSIDE}|{DIFFERS}"),
    (
        "matmul",
        "tl.multiple_of(k // 2, RUN // 2)",
        "tl.multiple_of(k, RUN // 2)",
        "linear_into",
        3,
        f"load of .* {OUTSIDE}",
    ),
    (
        "grouped",
        "inside = row < end",
        "inside = row < end + 1",  # the first row of the next expert
        "grouped_linear",
        1,
        f"race: blocks 1 and 0 store to the same place|{DIFFERS}",
    ),
    ("dropout", "0x7FEB352D", "0x7FEB352F", "lora_project", 1, DIFFERS),
    ("half", "(bits >> 23) - POWERS, 1)", "(bits >> 23) - POWERS - 1, 1)", "rows_to_half", 0, DIFFERS),
    ("half", "* tl.minimum(a, b) * tl.maximum(a, b)", "* tl.minimum(a, b)", "linear_into", 6, DIFFERS),
    # Triton itself puts a barrier before an atomic operation.
    ("launch", "    tl.debug_barrier()", "    pass", "linear_into", 2, "None"),
]


@pytest.mark.parametrize("target", ["sm_80", *amd.targets("gfx1100")])
@pytest.mark.parametrize(("file", "text", "replacement", "op", "number", "found"), BUGS)
def test_a_bug_in_the_source_is_found(tmp_path, file, text, replacement, op, number, found, target):
    for part in ("lightning_qlora", "tests", "benchmarks"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "lightning_qlora" / "kernels" / "triton" / f"{file}.py"
    assert text in path.read_text(encoding="utf-8")
    path.write_text(path.read_text(encoding="utf-8").replace(text, replacement), encoding="utf-8")
    code = f"from tests.emulator.test_kernels import fault; print(fault({target!r}, {op!r}, {number}))"
    run = run_python("-c", code, folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert re.search(found, run.stdout), run.stdout + run.stderr


# Everything that orders accesses of different threads, or of asynchronous instructions: as PTX, and in AMD's code the
# word of `s_barrier`, or on RDNA 4 of `s_barrier_wait`. And what takes its place.
ORDERS = {
    "sm": rb"(?m)^\s*(bar\.sync|cp\.async\.wait_group|fence\.proxy\.async|wgmma\.fence|wgmma\.wait_group)\b[^;]*;",
    "gfx11": b"(\x00\x00\xbd\xbf)",
    "gfx12": b"(\xff\xff\x94\xbf)",
    "gfx9": b"(\x00\x00\x8a\xbf)",
}
S_NOP = b"\x00\x00\x80\xbf"


def kernels():
    torch.manual_seed(0)
    x, few = torch.randn(20, 256).bfloat16(), torch.randn(7, 512).bfloat16()
    weight, wide = (reference.quantize(torch.randn(66, columns), "nf4", 64, True) for columns in (256, 512))
    a = torch.randn(8, 256)
    return {
        "first product of the adapter": lambda: lora_down(x, a),
        "product": lambda: add_matmul_(torch.zeros(20, 66).bfloat16(), x, weight),
        "product with shared sums": lambda: add_matmul_(torch.zeros(7, 66).bfloat16(), few, wide),
        "quantize": lambda: quantize(x, "nf4", 64, True).packed,
    }


def outcome(target, call, code, changed, expected):
    """What happens if `changed` takes the place of `code`: None if nothing is noticed."""
    scratch.release()  # a kernel that failed leaves counters that are not zero
    with emulated(target) as emulation:
        emulation.change = lambda given: changed if given == code else given
        try:
            return None if torch.equal(call(), expected) else "another result"
        except Fault as fault:
            return str(fault)


@pytest.mark.parametrize("name", kernels())
@pytest.mark.parametrize("target", ["sm_80", "sm_90", *amd.targets()])
def test_each_barrier_that_is_taken_out_is_noticed_or_another_one_does_its_work(target, name):
    """Another one: without those of the same kind before and after it (at most two each) the race is there."""
    call, codes = kernels()[name], []
    scratch.release()
    with emulated(target) as emulation:
        emulation.change = lambda code: codes.append(code) or code
        expected = call()
    for code in dict.fromkeys(codes):
        places = orders(target, code)
        for number, place in enumerate(places):
            same = [other for other, each in enumerate(places) if each[1] == place[1]]
            at = same.index(number)
            nearby = ([number], same[max(at - 1, 0) : at + 2], same[max(at - 2, 0) : at + 3])
            assert any(
                outcome(target, call, code, without(target, code, [places[other] for other in others]), expected)
                for others in nearby
            ), f"byte {place.start()}: {place[0]}"


def orders(target, code):
    pattern = next(pattern for prefix, pattern in ORDERS.items() if target.startswith(prefix))
    places = list(re.finditer(pattern, code))
    return [place for place in places if place.start() % 4 == 0] if target in amd.TARGETS else places


def without(target, code, places):
    for place in sorted(places, key=lambda place: -place.start()):
        code = code[: place.start()] + (S_NOP if target in amd.TARGETS else b"") + code[place.end() :]
    return code
