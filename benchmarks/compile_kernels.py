"""The compile gate: every kernel with every tile of the tables, for every card, without a card.

    python -m benchmarks.compile_kernels [--target sm_90 ...] [--kernel NAME] [--short] [--tiles FILE] [--write PAGE]

It fails (exit status 1) on a spill, local memory, more shared memory than the card has, a compiler warning such as
"wgmma serialized", more instructions per weight than the budget, or a kernel that does not compile.
`make compile-kernels` runs all of it and writes a summary into tests/record.md; the tests run the short form.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.compiled import Report, compile_launch, recorded
from benchmarks.products import add_matmul_, finish, lora_down, lora_gradients, lora_up
from lightning_qlora.kernels import reference
from lightning_qlora.kernels.half import Half
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.triton import launch
from lightning_qlora.kernels.triton.dropout import dropout_into
from lightning_qlora.kernels.triton.grouped import Group
from lightning_qlora.kernels.triton.half import rows_to_half, take_out_
from lightning_qlora.kernels.triton.quantize import dequantize, quantize
from lightning_qlora.quantization.packed_weight import stack_bytes

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
OF_A_FAMILY = ("sm_103", "sm_121")  # with the tiles of sm_100 and sm_120; for `--target`
SHORT = ("sm_80", "sm_90")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
HALF = "fp16 to fp32"  # of a `Half`, whose results are fp32
Kind = torch.dtype | str
KINDS: tuple[Kind, ...] = (torch.bfloat16, torch.float16, HALF)  # that products multiply, the usual one first


def _name(kind: Kind) -> str:
    return kind if isinstance(kind, str) else NAMES[kind]


def _matrix(rows: int, columns: int, kind: Kind) -> Any:
    """Zeros of a kind."""
    if isinstance(kind, str):
        return Half(torch.zeros(rows, columns, dtype=torch.float16), torch.ones(rows, 1))
    return torch.zeros(rows, columns, dtype=kind)


@dataclass(frozen=True)
class Case:
    """A launch to compile.

    Attributes:
        name: What the table calls it.
        launch: Calls the launch function once.
        weights: Weights that one thread of a warp of 32 handles in what is counted: the kernel, or its longest loop.
        budget: Most machine instructions per weight.
        loop: Count the longest loop alone.
        short: Part of the short form.
        place: Which of the launches that it makes.
    """

    name: str
    launch: Callable[[], object]
    weights: float
    budget: float
    loop: bool = False
    short: bool = True
    place: int = -1


def cases(target: str) -> Iterator[Case]:
    """All launches for a target, with the target's tiles."""
    for make in (
        _dequantize_cases, _quantize_cases, _dropout_cases, _half_cases, _lora_cases, _wide_cases, _matmul_cases,
        _vector_cases, _grouped_cases,
    ):  # fmt: skip
        yield from make(target)


def _tiles(kernel: str, target: str) -> list[tuple[launch.Tile, int]]:
    """Each tile of a kernel, and the threads it runs with (a warp counted as 32)."""
    rows = launch.tiles_of(kernel, target)
    return [(tile, 32 * tile["num_warps"]) for tile in rows]


def _dequantize_cases(target: str) -> Iterator[Case]:
    for tile, threads in _tiles("dequantize", target):
        # Every type at the usual block size; the others change no more than the number of scales.
        kinds = [*product((64,), (True, False), NAMES), *product((32, 4096), (True,), (torch.bfloat16,))]
        for block_size, double_quant, dtype in kinds:
            weight = reference.quantize(torch.randn(64, 256), "nf4", block_size, double_quant)
            # Without instructions for bf16 (Turing) each rounding to it takes several.
            budget = 11.5 if target == "sm_75" and dtype == torch.bfloat16 else 7
            yield Case(
                f"dequantize {NAMES[dtype]}, block {block_size}{', double quantization' * double_quant}",
                partial(dequantize, weight, dtype), tile["WEIGHTS"] / threads, budget,
                short=block_size == 64 and double_quant,
            )  # fmt: skip
        odd = reference.quantize(torch.randn(63, 33), "nf4", 64, True)
        yield Case(
            "dequantize bf16, odd size", partial(dequantize, odd, torch.bfloat16), tile["WEIGHTS"] / 4 / threads, 32
        )


def _quantize_cases(target: str) -> Iterator[Case]:
    smallest = 1
    for tile, threads in _tiles("quantize", target):
        sizes = [size for size in (32, 64, 2048, 4096) if smallest <= size <= tile["up_to"]]
        smallest = tile["up_to"] + 1
        kinds = [*product(("nf4",), sizes, NAMES), *product(("fp4",), sizes, (torch.bfloat16,))]
        for quant_type, block_size, dtype in kinds:
            yield Case(
                f"quantize {NAMES[dtype]} to {quant_type}, block {block_size}",
                partial(quantize, torch.randn(64, 256).to(dtype), quant_type, block_size, False),
                tile["WEIGHTS"] / threads, 80 if quant_type == "nf4" else 100,
                short=(quant_type, block_size, dtype) == ("nf4", 64, torch.bfloat16),
            )  # fmt: skip
        odd = partial(quantize, torch.randn(63, 33), "nf4", sizes[-1], False)
        yield Case(
            f"quantize fp32 to nf4, block {sizes[-1]}, odd size", odd, tile["WEIGHTS"] / threads, 110, short=False
        )
    for tile, threads in _tiles("nest", target):
        scales = 256 * tile["BLOCKS"] / threads
        yield Case("quantize the scales", partial(quantize, torch.randn(64, 256), "nf4", 64, True), scales, 40)


def _dropout_cases(target: str) -> Iterator[Case]:
    for tile, threads in _tiles("dropout", target):
        for dtype in NAMES:
            x = torch.randn(64, 64).to(dtype)
            yield Case(
                f"dropout {NAMES[dtype]}",
                partial(dropout_into, x, x, 0.1, torch.tensor([7])),
                tile["SIZE"] / threads,
                32,
                short=dtype == torch.bfloat16,
            )


def _half_cases(target: str) -> Iterator[Case]:
    seed = torch.tensor([7])
    for tile, threads in _tiles("rows_to_half", target):
        size, per_thread = tile["SIZE"], tile["SIZE"] / threads
        rows, long = torch.randn(64, size), torch.randn(2, 2 * size)
        name = f"rows to fp16, {size} numbers"
        yield Case(name, partial(rows_to_half, rows), per_thread, 14)
        yield Case(f"{name}, dropout", partial(rows_to_half, rows, None, 0.1, seed), per_thread, 38)
        yield Case(f"{name}, factors", partial(rows_to_half, rows.T.contiguous().T, torch.ones(size)), per_thread, 28)
    yield Case("rows to fp16, any length", partial(rows_to_half, long, torch.ones(2 * size)), per_thread, 40)
    x = torch.randn(64, 4096)
    for tile, threads in _tiles("finish", target):
        take_out = partial(take_out_, x, torch.ones(64, 1), torch.ones(1, 4096), 1.0)
        yield Case("powers taken out", take_out, tile["M"] * tile["N"] / threads, 14)
    for (tile, threads), r, p, forward in product(_tiles("finish", target), (16, 64), (0.0, 0.1), (True, False)):
        # In fp32, so a step of the loop has RANKS multiplications for each element.
        w, seed = torch.zeros(4096, r), torch.tensor([7]) if p else None
        add = partial(finish, x, torch.zeros(64, r), w if forward else torch.zeros(r, 4096).T, p, seed)
        name = f"adapter and powers, rank {r}{', dropout' * bool(p)}{', transposed' * (not forward)}, per element"
        yield Case(name, add, tile["M"] * tile["N"] / threads, 1.5 * min(r, tile["RANKS"]) + 12 + 24 * bool(p))


def _lora_cases(target: str) -> Iterator[Case]:
    # The hash of the dropout mask takes about 21 instructions per element.
    budgets = {"lora_down": (22, 9), "lora_up": (38, 14), "lora_gradients": (9, 9)}
    for kernel, (few, many) in budgets.items():
        for tile, threads in _tiles(kernel, target):
            m, elements = tile.get("up_to", 4096), tile["M"] * tile.get("K", tile.get("N", 0)) / threads
            for dtype, r, p in product(KINDS[:2], (16, 64), (0.0, 0.1)):
                yield Case(
                    f"{kernel} {_name(dtype)}, {m} rows, rank {r}{', dropout' * bool(p)}, per element",
                    _lora(kernel, m, r, dtype, p), elements, (few if m <= 16 else many) + 24 * bool(p),
                    loop=kernel != "lora_up", short=dtype == torch.bfloat16 and r == 64,
                )  # fmt: skip


def _wide_cases(target: str) -> Iterator[Case]:
    """x in fp32 that is cast to bf16, as the backward pass reads it too, and sums in fp32."""
    for tile, threads in _tiles("lora_down_fp32", target):
        m, r, elements = tile.get("up_to", 4096), 64, tile["M"] * tile["K"] / threads
        x, cast = torch.zeros(m, 512), torch.zeros(m, 512, dtype=torch.bfloat16)
        for p in (0.0, 0.1):
            name = f"{m} rows, rank {r}{', dropout' * bool(p)}, per element"
            seed = torch.tensor([7]) if p else None
            down = partial(lora_down, x, torch.zeros(r, 512), p=p, seed=seed, cast=cast)
            yield Case(
                f"fp32 to bf16: lora_down, {name}", down, elements, (26 if m <= 16 else 14) + 24 * bool(p), loop=True
            )
            if m > 16:
                h = torch.zeros(m, r, dtype=torch.bfloat16)
                for each, others in _tiles("lora_gradients", target):
                    per_thread = each["M"] * each["N"] / others
                    add = partial(lora_gradients, h, x, torch.zeros(r, 512), h, cast, torch.zeros(512, r), 1.0, p, seed)
                    yield Case(f"fp32 to bf16: lora_gradients, {name}", add, per_thread, 12 + 24 * bool(p), loop=True)
                for each, others in _tiles("finish", target):
                    add = partial(finish, x, h, torch.zeros(512, r), p, seed)
                    budget = 20 + 24 * bool(p)
                    yield Case(f"fp32 to bf16: finish, {name}", add, each["M"] * each["N"] / others, budget)


def _lora(kernel: str, m: int, r: int, dtype: Kind, p: float) -> Callable[[], object]:
    x, h, seed = _matrix(m, 512, dtype), _matrix(m, r, dtype), torch.tensor([7]) if p else None
    a = torch.zeros(r, 512)
    if kernel == "lora_down":
        return partial(lora_down, x, a, p=p, seed=seed)
    if kernel == "lora_up":
        return partial(lora_up, h, a.T, x, p=p, seed=seed)
    return partial(lora_gradients, h, x, a, h, x, torch.zeros(512, r), 1.0, p, seed)


def _matmul_cases(target: str) -> Iterator[Case]:
    halves = KINDS
    for tile, threads in _tiles("matmul", target):
        rows = tile["up_to"]
        kinds = [*product(halves, (64,), (True, False)), *product(halves[:1], (32, 4096), (True,))]
        for kind, block_size, double_quant in kinds:
            run = min(block_size, 64)
            yield Case(
                f"matmul {_name(kind)}, {rows} rows, block {block_size}{', double quantization' * double_quant}",
                _matmul(rows, kind, block_size, double_quant), run * tile["N"] / threads,
                13 if run == 64 else 24, loop=True, short=kind == torch.bfloat16 and block_size == 64 and double_quant,
            )  # fmt: skip


def _vector_cases(target: str) -> Iterator[Case]:
    for (tile, threads), double_quant, rows in product(_tiles("vector", target), (True, False), (1, 2)):
        name = f"product without tensor cores, {rows} rows{', double quantization' * double_quant}"
        weights = 8 * tile["ROWS"] * tile["WORDS"] / threads
        yield Case(name, _matmul(rows, torch.float32, 64, double_quant), weights, 13, loop=True)


def _matmul(rows: int, kind: Kind, block_size: int, double_quant: bool) -> Callable[[], object]:
    weight = reference.quantize(torch.randn(128, 512), "nf4", block_size, double_quant)
    out = torch.zeros(rows, 128, dtype=torch.float32 if isinstance(kind, str) else kind)
    return partial(add_matmul_, out, _matrix(rows, 512, kind), weight)


def _grouped_cases(target: str) -> Iterator[Case]:
    """128 experts, as in Qwen3-MoE."""
    for tile, threads in _tiles("grouped", target):
        rows, weights = tile.get("up_to", 64), tile["N"] * 64 / threads
        kinds = [*product(KINDS, (64,), (True, False)), (torch.bfloat16, 32, True)]
        for dtype, block_size, double_quant in kinds:
            kind = f"{_name(dtype)}, {rows} rows, block {block_size}{', double quantization' * double_quant}"
            usual = dtype == torch.bfloat16 and block_size == 64 and double_quant and rows > 16
            for backward in (False, True):
                name = f"experts{', backward' * backward}, {kind}"
                launch = _grouped(rows, dtype, block_size, double_quant, backward, 0)
                yield Case(name, launch, weights * min(block_size, 64) / 64, 20, loop=True, short=usual)
        elements = tile["M"] * tile["K"] / threads
        for p in (0.0, 0.1):
            name = f"adapters of experts bf16, {rows} rows, rank 64{', dropout' * bool(p)}, per element"
            launch = _grouped(rows, torch.bfloat16, 64, True, False, 1, p)
            yield Case(name, launch, elements, 20 + 24 * bool(p), loop=True, short=rows > 16 and p > 0)
            name = f"gradients of adapters of experts bf16, {rows} rows{', dropout' * bool(p)}, per element"
            launch = _grouped(rows, torch.bfloat16, 64, True, True, 2, p)
            yield Case(name, launch, elements, 20 + 24 * bool(p), loop=True, short=rows > 16 and p > 0)


def _grouped(
    rows: int, kind: Kind, block_size: int, double_quant: bool, backward: bool, kernel: int, p: float = 0.0
) -> Callable[[], object]:
    """One of the launches for experts: the product, the first product of the adapters, the gradients of A."""
    experts, seed = 128, torch.tensor([7]) if p else None
    weight = reference.quantize(torch.randn(128, 512), "nf4", block_size, double_quant)
    total = rows * experts
    x = _matrix(total, 128 if backward and kernel == 0 else 512, kind)
    h = _matrix(total, 64, kind)
    ends, stack = torch.full((experts,), total, dtype=torch.int32), stack_bytes([weight] * experts)
    a, b = torch.zeros(experts, 64, 512), torch.zeros(experts, 128, 64)

    def call() -> None:
        group = Group(total, ends, stack, LoRA(a, b, 1.0, p, seed), kind == HALF)
        of_x, of_h = group.factor(x), group.factor(h)
        if kernel == 0:
            group.product(of_x, of_h, backward)
        elif kernel == 1:
            group.project(of_x, backward)
        else:
            group.gradients(of_h, of_x, of_b=False)

    return call


def check(case: Case, target: str) -> tuple[Report, float, list[str]]:
    """The report of a case on a target, its instructions per weight, and what is wrong with it."""
    with recorded(target) as launches:
        case.launch()
    report = compile_launch(launches[case.place], target)
    counted = report.loop_instructions if case.loop else report.instructions
    # A wavefront of these AMD cards has 64 threads.
    per_weight = counted / case.weights * (2 if target.startswith("gfx") else 1)
    wrong = list(report.warnings)
    if report.spill_bytes:
        wrong.append(f"{report.spill_bytes} bytes of registers spilled")
    if report.local_operations:
        wrong.append(f"{report.local_operations} instructions on local memory")
    if report.shared_kib > report.shared_limit_kib:
        wrong.append(f"{report.shared_kib:.0f} KiB of shared memory, the card has {report.shared_limit_kib}")
    if not target.startswith("gfx") and per_weight > case.budget:
        wrong.append(f"{per_weight:.2f} instructions a weight, the budget is {case.budget}")
    return report, per_weight, wrong


Summary = dict[str, Report]  # of each kernel the most registers, spilled bytes and shared memory of its launches


def _rows(target: str, short: bool, kernel: str, table: Path | None) -> tuple[list[str], list[str], Summary]:
    """The lines of the table for a target, the failures, and the summary."""
    launch.TABLE |= launch.read(table or launch.FILE)
    rows, failures, summary = [], [], Summary()
    for case in cases(target):
        if (short and not case.short) or not case.name.startswith(kernel):
            continue
        try:
            report, per_weight, wrong = check(case, target)
        except Exception as error:  # the compiler raises what it likes; each is a failure of the gate
            report, per_weight, wrong = Report(), 0.0, [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
        most = summary.setdefault(_kernel(case.name), Report())
        for name in ("registers", "spill_bytes", "shared_kib"):
            setattr(most, name, max(getattr(most, name), getattr(report, name)))
        budget = "" if target.startswith("gfx") else f"{case.budget:g}"
        rows.append(
            f"| {target} | {case.name} | {report.registers} | {report.spill_bytes} | {report.shared_kib:.1f} | "
            f"{per_weight:.2f} | {budget} | {'; '.join(wrong) or 'ok'} |"
        )
        failures += [f"{target}, {case.name}: {what}" for what in wrong]
    return rows, failures, summary


def _kernel(case: str) -> str:
    """The kernel in the name of a case: "dequantize bf16, odd size" -> "dequantize"."""
    return re.split(r" (?:bf16|fp16|fp32)\b|, ", case)[0]


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table, and return how the gate stands: 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measured = sorted({name for table in launch.TABLE.values() for name in table if " " in name})
    choices = (*TARGETS, *OF_A_FAMILY, *measured)
    parser.add_argument("--target", action="append", choices=choices, help="only this one; may be repeated")
    parser.add_argument("--kernel", default="", help="only launches whose names begin so")
    parser.add_argument("--short", action="store_true", help=f"the main cases; without --target, {' and '.join(SHORT)}")
    parser.add_argument("--tiles", type=Path, help="take the tiles from this file, not from tiles.json")
    parser.add_argument("--write", type=Path, help="put the summary into this file, between its two marks")
    chosen = parser.parse_args(arguments)
    targets = chosen.target or (SHORT if chosen.short else (*TARGETS, *measured))
    head = ["| card | launch | registers | spilled bytes | shared KiB | instructions a weight | budget | gate |"]
    head.append("|---|---|---:|---:|---:|---:|---:|---|")
    arguments = targets, repeat(chosen.short), repeat(chosen.kernel), repeat(chosen.tiles)
    if len(targets) == 1:
        results = list(map(_rows, *arguments))
    else:
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:  # a fork would inherit torch's locks
            results = list(pool.map(_rows, *arguments))
    failures = [failure for _, failed, _ in results for failure in failed]
    print(*head, *(row for rows, _, _ in results for row in rows), sep="\n")
    if chosen.write:
        _write(chosen.write, dict(zip(targets, (summary for _, _, summary in results), strict=True)))
    print(*failures, f"{len(failures)} failures", sep="\n", file=sys.stderr)
    return 1 if failures else 0


def _write(page: Path, summaries: dict[str, Summary]) -> None:
    """Put a table with a row for each kernel and a column for each card between the two marks of a page."""
    begin, end = "<!-- compiled: begin -->\n", "<!-- compiled: end -->"
    kernels = dict.fromkeys(kernel for summary in summaries.values() for kernel in summary)
    lines = [f"| kernel | {' | '.join(summaries)} |", "|---" * (len(summaries) + 1) + "|"]
    for kernel in kernels:
        reports = [summary.get(kernel) for summary in summaries.values()]
        cells = [f"{r.registers} / {r.spill_bytes} / {round(r.shared_kib, 1):g}" if r else "" for r in reports]
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    before, rest = page.read_text(encoding="utf-8").split(begin)
    page.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
