"""The short form of the compile gate for one card (`make compile-kernels` runs all of it), and the gate's own tests."""

import json
from collections import defaultdict
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tiles as search
from benchmarks.compile_kernels import cases, check, main
from benchmarks.compiled import recorded
from benchmarks.products import lora_down, lora_up
from lightning_qlora.kernels import triton as kernels
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.triton import launch
from lightning_qlora.kernels.triton.lora_products import MAX_GRID
from tests.kernels import verify
from tests.kernels.triton.launches import MODULES, forget_launches
from tests.toys import needs


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A file for other tiles; the real ones come back."""
    monkeypatch.setattr(launch, "TABLE", dict(launch.TABLE))
    return tmp_path / "tiles.json"


SHORT = [case for case in cases("sm_90") if case.short]
ONE_OF_EACH = {case.name.split(",")[0]: case for case in SHORT}.values()
OTHERS = [pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in SHORT if case not in ONE_OF_EACH]


@needs("triton", "3.7", "the budgets are those of its code")
@pytest.mark.parametrize("case", [*(pytest.param(case, id=case.name) for case in ONE_OF_EACH), *OTHERS])
def test_a_launch_compiles_within_its_budget(case):
    _, _, wrong = check(case, "sm_90")
    assert not wrong


@needs("triton", "3.7", "the budgets are those of its code")
def test_code_behind_the_kernel_that_waits_is_not_part_of_the_loop():
    """On sm_100 it jumps back into the kernel, past the end of the loop and code that runs once."""
    name = "lora_down bf16, 4096 rows, rank 64, per element"
    report, per_element, _ = check(next(case for case in cases("sm_100") if case.name == name), "sm_100")
    assert 1 < per_element < 9
    assert report.loop_instructions < report.instructions / 4


def test_a_candidate_of_the_search_for_tiles_that_does_not_compile_is_dropped(table):
    usable = search.candidates("lora_up", 16)[0]
    assert not search.problem("lora_up", 16, "sm_90", usable)
    assert "CompilationError" in search.problem("lora_up", 16, "sm_90", launch.Tile(usable, M=24))


def test_no_kernel_is_left_out():
    compiled = set()
    for target in ("sm_75", "sm_90"):  # torch multiplies for the first
        for case in cases(target):
            with recorded(target) as launches:
                case.launch()
            compiled.add(launches[case.place].kernel.__name__)
    assert compiled == {name for module in MODULES.values() for name in vars(module) if name.endswith("_kernel")}


def test_the_check_of_a_card_reaches_both_values_of_each_choice_of_a_kernel():
    """Dropout or none, sums that programs share or not, ..., and each type."""
    seen = defaultdict(set)
    for op, target in product(verify.OPS, ("sm_90", "sm_75")):  # torch multiplies for the second one
        for arguments in verify.cases(op):
            if target == "sm_75" and op.startswith("grouped"):
                continue
            forget_launches()
            with recorded(target) as launches:
                verify.function_of(kernels, op)(*arguments)
            for each in launches:
                name = each.kernel.__name__
                types = [value.dtype for value in each.arguments.values() if isinstance(value, torch.Tensor)]
                seen[name, "types"].update(types)
                for key, value in each.arguments.items():
                    if isinstance(value, bool):
                        seen[name, key].add(value)
    alone = {key for key, values in seen.items() if "types" not in key and len(values) < 2}
    assert not alone
    for name in (
        "_down_kernel",
        "_up_kernel",
        "_matmul_kernel",
        "_gradients_kernel",
        "_product_kernel",
    ):
        assert seen[name, "types"] >= {torch.float32, torch.bfloat16, torch.float16}, name


@pytest.mark.parametrize(("hip", "target"), [(None, "sm_90"), ("7.0", "gfx942")])
def test_programs_share_a_sum_except_on_amd_where_barriers_do_not_wait_for_memory(monkeypatch, hip, target):
    monkeypatch.setattr(torch.version, "hip", hip)
    rows = 13 if hip else 12  # launches are cached by their sizes
    with recorded(target) as launches:
        lora_down(torch.zeros(rows, 2048, dtype=torch.bfloat16), torch.zeros(16, 2048))
    assert launches[0].arguments["SPLIT"] == (hip is None)


def test_more_rows_than_a_grid_has_programs_for_are_multiplied_by_torch():
    m = MAX_GRID * launch.find_tile("lora_up", torch.device("cpu"), MAX_GRID)["M"] + 1
    x = torch.ones(m, 2, dtype=torch.bfloat16)
    lora = LoRA(torch.ones(1, 2), torch.ones(3, 1))
    with recorded("sm_90") as launches:
        assert kernels.plan(x, lora).lora_project(x, lora).sum(dtype=torch.int64) == 2 * m
        assert not launches
        kernels.plan(x[1:], lora).lora_project(x[1:], lora)
        lora_up(x[1:, :1], torch.ones(2, 1), x[1:])
    assert launches[1].grid[1] == MAX_GRID


def test_a_spilling_tile_fails(table, capsys):
    table.write_text(json.dumps({"dequantize": {"default": [{"WEIGHTS": 4096, "num_warps": 1, "maxnreg": 24}]}}))
    assert main(["--short", "--kernel", "dequantize", "--target", "sm_80", "--tiles", str(table)]) == 1
    assert "bytes of registers spilled" in capsys.readouterr().err


def test_a_kernel_that_does_not_compile_fails(table, capsys):
    table.write_text(json.dumps({"dequantize": {"default": [{"WEIGHTS": 192, "num_warps": 1}]}}))
    assert main(["--short", "--kernel", "dequantize", "--target", "sm_80", "--tiles", str(table)]) == 1
    assert "CompilationError" in capsys.readouterr().err
