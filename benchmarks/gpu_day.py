"""Run all GPU measurements within a budget of GPU time.

    python -m benchmarks.gpu_day --budget 540 --state outputs/gpu --out outputs/gpu
    python -m benchmarks.gpu_day --state outputs/gpu --write  # writes docs/benchmarks.md and tiles.json; needs no GPU
    python -m benchmarks.gpu_day --small                      # every cell with tiny shapes, also on a CPU
    python -m benchmarks.gpu_day --list

A cell is one part of the measurements. Cells run in order of value, each in its own process with a time limit, so a
crash or a timeout loses one cell. When a cell ends, one JSON line with its commit and card is appended to
OUT/gpu_day.jsonl. Cells that are in STATE are skipped; cells that failed are tried again last; a cell does not start if
its estimated time exceeds the rest of the budget. Running the same command three times with a budget of 540 seconds
therefore measures everything. If OUT and STATE differ, copy OUT to STATE between the runs: OUT contains the results of
STATE. OUT/gpu_day.log has the output of all cells.

How to install the peers on a machine without a network (a missing peer is reported and skipped). bitsandbytes needs its
Python files and the library for the CUDA version of the machine (libbitsandbytes_cuda130.so for CUDA 13.0, 4 MB):

    pip download --no-deps --only-binary=:all: -d wheels bitsandbytes peft accelerate          # with a network
    unzip -q wheels/bitsandbytes-*.whl -x '*cuda1[12]*' '*cuda132*' '*rocm*' '*xpu*' -d peers
    pip install --no-index --no-deps --target peers wheels/peft-*.whl wheels/accelerate-*.whl  # on the machine
    PYTHONPATH=peers python -m benchmarks.gpu_day ...
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.gpu_cells import CELLS, ROW, Cell
from benchmarks.gpu_cells.results import Record, card_name, code_version, done, install_tiles, read, save
from benchmarks.measure import ROOT

MARGIN = 5  # seconds of the budget reserved for writing the results
TAIL = 30  # last lines of a failed cell that are kept


class Day:
    """One run of the command: its end, where results go, and what they are stored under."""

    def __init__(self, budget: float, out: Path, commit: str, card: str, small: bool = False) -> None:
        self.end = time.monotonic() + budget
        self.out = out
        self.commit = commit
        self.card = card
        self.small = small

    def run(self, cells: Sequence[Cell]) -> Iterator[Record]:
        """Run the cells that fit in the budget; yields the record of each as soon as it ends."""
        for cell in cells:
            left = self.end - time.monotonic() - MARGIN
            if cell.estimate > left and not self.small:
                print(f"{cell.name}: not started, takes {cell.estimate} s, left are {max(left, 0):.0f} s", flush=True)
            else:
                yield self._run_cell(cell, left if self.small else min(cell.limit, left))

    def _run_cell(self, cell: Cell, limit: float) -> Record:
        log = self.out / f"{cell.name}.log"
        start = time.monotonic()
        ended = (fork if self.small and self.card.startswith("CPU") else self._start)(cell, log, limit)
        output = log.read_text(errors="replace")
        rows = [json.loads(line[len(ROW) :]) for line in output.splitlines() if line.startswith(ROW)]
        with (self.out / "gpu_day.log").open("a") as file:
            file.write(f"==== {cell.name}, {self.commit}, {self.card}\n{output}\n")
        log.unlink()
        record: Record = {
            "commit": self.commit,
            "cell": cell.name,
            "card": self.card,
            "status": "ok" if ended == 0 else "failed",
            "seconds": round(time.monotonic() - start, 1),
            "when": time.strftime("%Y-%m-%d %H:%M"),
            "rows": rows,
        }
        if ended != 0:
            record["reason"] = f"stopped after {limit:.0f} s" if ended is None else f"ended with status {ended}"
            record["last_lines"] = [line[:500] for line in output.splitlines() if not line.startswith(ROW)][-TAIL:]
        return record

    def command(self, cell: Cell) -> list[str]:
        """The command line that runs a cell."""
        return [sys.executable, "-m", "benchmarks.gpu_cells", cell.name, *(["--small"] if self.small else [])]

    def _start(self, cell: Cell, log: Path, limit: float) -> int | None:
        """Run a cell in a new process and return its exit status; None if it was stopped at the limit."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]),
            "PYTHONUNBUFFERED": "1",
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.command(cell),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,
            )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            kill_group(process.pid)
            process.wait()


def fork(cell: Cell, log: Path, limit: float) -> int | None:
    """Run a cell in a fork of this process: with tiny shapes on a CPU, imports would take most of the time."""
    from benchmarks.gpu_cells.__main__ import run_cell

    for package in ("transformers.models.llama", "peft", "bitsandbytes"):  # import each once, not once a cell
        if find_spec(package.partition(".")[0]):
            import_module(package)
    cell.load()

    def child() -> None:
        os.setpgrp()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        run_cell(cell.name, small=True)

    process = get_context("fork").Process(target=child)
    process.start()
    process.join(limit)
    ended = process.exitcode
    kill_group(process.pid or 0)
    process.join()
    return ended


def kill_group(leader: int) -> None:
    """Kill a process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for this run")
    parser.add_argument("--state", type=Path, default=ROOT / "outputs" / "gpu", help="folder with earlier results")
    parser.add_argument("--out", type=Path, help="folder for results; default: the state folder")
    parser.add_argument("--only", help="some of the cells, with commas between")
    parser.add_argument("--any-commit", action="store_true", help="results of another commit count as well")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on a CPU too: do the cells run?")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--write", action="store_true", help="write the results into docs/benchmarks.md and stop")
    options = parser.parse_args(arguments)
    os.environ |= {"BITSANDBYTES_NOWELCOME": "1", "HF_HUB_OFFLINE": "1"}
    names = [cell.name for cell in CELLS]
    chosen = names if options.only is None else options.only.split(",")
    if unknown := set(chosen) - set(names):
        parser.error(f"--only: there is no cell {', '.join(sorted(unknown))}; there are {', '.join(names)}.")
    if options.list:
        for cell in CELLS:
            print(f"{cell.name:15} about {cell.estimate:3} s, stopped after {cell.limit:3} s: {cell.about}")
        print(f"all: about {sum(cell.estimate for cell in CELLS)} s")
        return 0
    if options.write:
        from benchmarks.gpu_cells.page import write_page

        records = read(options.state)
        install_tiles(records)
        write_page(records)
        return 0
    return _run(options, [cell for cell in CELLS if cell.name in chosen])


def _run(options: argparse.Namespace, cells: list[Cell]) -> int:
    card = card_name()
    commit = code_version()
    if card is None and not options.small:
        print("There is no GPU here. --small tries every cell with tiny shapes on the CPU.", file=sys.stderr)
        return 1
    card = f"{card or 'CPU'}, small" if options.small else str(card)
    out: Path = options.out or options.state
    out.mkdir(parents=True, exist_ok=True)
    records = read(options.state)
    held = read(out)
    for record in records:
        if record not in held:  # OUT is another folder; it can then replace STATE
            save(out, record)
    mine = [record for record in records if record["card"] == card]
    if not options.any_commit:
        mine = [record for record in mine if record["commit"] == commit]
    if not options.small:
        install_tiles(mine)
    day = Day(options.budget, out, commit, card, options.small)
    left = todo(cells, mine)
    if left and "check" in done(mine) and not options.small:
        check_kernels()
    failed = 0
    for record in day.run(left):
        save(out, record)
        failed += record["status"] != "ok"
        print(f"{record['cell']}: {record['status']}, {record['seconds']} s", flush=True)
        failures = [row["failure"] for row in record["rows"] if "failure" in row]  # of tests; their cell is "ok"
        for line in [*failures, *record.get("last_lines", [])[-8:]]:
            print(f"    {line[:200]}", flush=True)
    from benchmarks.gpu_cells.page import goals_text

    print(goals_text(read(out)))
    return 1 if failed else 0


def check_kernels() -> None:
    """Let this machine check the kernels: on a new one, with an empty cache, the limit of the first cell is too short.

    It also reads torch from a cold disk. The cell "check" measures the check itself.
    """
    code = "import torch; from lightning_qlora.kernels.backends import describe; describe(torch.device('cuda', 0))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)


def todo(cells: Sequence[Cell], records: Sequence[dict[str, Any]]) -> list[Cell]:
    """The cells that have no result yet; cells that failed before come last."""
    tried = {record["cell"] for record in records}
    left = [cell for cell in cells if cell.name not in done(records)]
    return sorted(left, key=lambda cell: cell.name in tried)


if __name__ == "__main__":
    sys.exit(main())
