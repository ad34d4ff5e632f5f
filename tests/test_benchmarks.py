"""The benchmarks run, and `gpu_day` keeps what it measured."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import deferred_logits, gpu_day, measure, peers, saved_tensors
from benchmarks.gpu_cells import CELLS, ROW, Cell, card, page, results
from benchmarks.gpu_cells.__main__ import main as single_cell
from benchmarks.timing import call_seconds, times
from lightning_qlora.kernels import eager
from tests.conftest import run_python


def test_one_round_is_enough_for_a_table():
    assert measure.spread([0.25]) == "250 (250 to 250)"
    assert measure.spread([0.1, 0.2, 0.3]) == "200 (100 to 300)"


def test_candidates_take_turns():
    called = []
    cpu = torch.device("cpu")
    functions = {name: lambda name=name: called.append(name) for name in "ab"}
    assert {name: len(values) for name, values in times(functions, cpu, rounds=3).items()} == {"a": 3, "b": 3}
    assert called == [*"aabb", *"ab" * 3]  # two calls each to warm up
    called.clear()
    call_seconds(functions, cpu, rounds=1, calls=2)
    assert called == [*"aabb" * 2]


class Scripted(gpu_day.Day):
    """Runs a line of Python in place of a cell."""

    def __init__(self, out, scripts, budget=60.0):
        super().__init__(budget, out, "abc", "a card")
        self.scripts = scripts
        self.started = []

    def command(self, cell):
        self.started.append(cell.name)
        return [sys.executable, "-c", self.scripts.get(cell.name, "")]


def cell(name, estimate=1, limit=20):
    return Cell(name, "", estimate, limit, "")


def row(**figures):
    return f"print({ROW + json.dumps(figures)!r}, flush=True);"


def test_a_crash_loses_one_cell_and_keeps_its_rows(tmp_path):
    scripts = {
        "good": row(figure=1),
        "crash": row(figure=2) + "raise SystemExit('out of luck')",
        "killed": "import os; os.kill(os.getpid(), 9)",
        "last": row(figure=3),
    }
    day = Scripted(tmp_path, scripts)
    records = {record["cell"]: record for record in day.run([cell(name) for name in scripts])}
    assert [record["status"] for record in records.values()] == ["ok", "failed", "failed", "ok"]
    assert list(records) == list(scripts)
    assert records["crash"]["rows"] == [{"figure": 2}]
    assert records["crash"]["last_lines"] == ["out of luck"]
    assert records["crash"]["reason"] == "ended with status 1"
    assert (records["last"]["commit"], records["last"]["card"]) == ("abc", "a card")
    assert "out of luck" in (tmp_path / "gpu_day.log").read_text()


def test_a_cell_that_takes_too_long_is_stopped_with_what_it_started(tmp_path):
    started = tmp_path / "started"
    child = f"import time; open({str(started)!r}, 'w').write(str(__import__('os').getpid())); time.sleep(3600)"
    script = row(figure=1) + f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    day = Scripted(tmp_path, {"slow": script})
    slow, after = day.run([cell("slow", limit=3), cell("after")])
    assert (slow["status"], slow["reason"], slow["rows"]) == ("failed", "stopped after 3 s", [{"figure": 1}])
    assert after["status"] == "ok"
    state = Path(f"/proc/{started.read_text()}/stat")
    assert not state.exists() or state.read_text().split(")")[1].split()[0] == "Z"


def test_no_cell_starts_that_does_not_fit_the_budget(tmp_path, capsys):
    day = Scripted(tmp_path, {}, budget=gpu_day.MARGIN + 10)
    assert [record["cell"] for record in day.run([cell("long", estimate=11), cell("short", estimate=2)])] == ["short"]
    assert day.started == ["short"]
    assert "long: not started" in capsys.readouterr().out


def test_what_is_done_is_not_done_again_and_failures_come_last(tmp_path):
    for name, status in (("one", "ok"), ("two", "failed"), ("four", "failed"), ("four", "ok")):
        results.save(tmp_path, {"cell": name, "status": status, "commit": "abc", "card": "a card"})
    (tmp_path / results.FILE).open("a").write('{"cut off')
    records = results.read(tmp_path)
    assert len(records) == 4
    cells = [cell(name) for name in ("one", "two", "three", "four")]
    assert [left.name for left in gpu_day.todo(cells, records)] == ["three", "two"]


def test_the_version_of_the_code_changes_with_the_package_but_not_with_its_tiles(tmp_path, monkeypatch):
    package = tmp_path / "lightning_qlora"
    tiles = package / "kernels" / "triton" / "tiles.json"
    tiles.parent.mkdir(parents=True)
    (package / "a.py").write_text("1")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "PACKAGE", package)
    monkeypatch.setattr(results, "TILES", tiles)
    without_git = results.code_version()
    assert without_git.startswith("sources-")
    tiles.write_text("{}")
    assert results.code_version() == without_git
    (package / "a.py").write_text("2")
    assert results.code_version() != without_git
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -q -m one"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    commit = results.code_version()
    assert len(commit) == 12
    tiles.write_text("[]")
    assert results.code_version() == commit
    (package / "a.py").write_text("3")
    assert results.code_version().startswith("sources-")


def test_tiles_that_were_found_are_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "TILES", tmp_path / "tiles.json")
    results.TILES.write_text("{}")
    record = {"cell": "tiles", "status": "ok", "card": "a card", "rows": [{"line": "16 rows"}, {"tiles_json": "{1}"}]}
    results.install_tiles([record | {"card": "CPU, small", "rows": [{"tiles_json": "small"}]}])
    assert results.TILES.read_text() == "{}"
    results.install_tiles([record])
    assert results.TILES.read_text() == "{1}"


def record(name, *rows, **changes):
    return {"cell": name, "status": "ok", "commit": "abc", "card": "H100", "rows": list(rows), **changes}


def step_row(variant, tokens, seconds):
    times = dict.fromkeys(["seconds", "fastest", "slowest"], seconds)
    return {"variant": variant, "tokens": tokens, **times, "peak_allocated_bytes": 9 * 10**9, "loss": 11.7}


def test_the_page_holds_goals_and_figures():
    assert page.goals_text([]).count(page.NOT_YET) == len(page.GOALS)
    memory = {"allocated_bytes": 42e9, "reserved_bytes": 43e9, "device_bytes": 44e9}
    text = page.page(
        [
            record("step", step_row(peers.OURS, 4096, 1.0), step_row(peers.DENSE, 4096, 0.8)),
            record("step_4bit", step_row(peers.OURS, 4096, 1.0), step_row(peers.BNB, 4096, 1.5)),
            record("largest", {"steps": "first step", "seconds": 2, "paged": "pinned", "paged_bytes": 0, **memory}),
            record("decode", status="failed", reason="stopped after 90 s"),
            record("layer", card="CPU, small"),
        ]
    )
    lines = {line.split("|")[2].strip(): line for line in text.splitlines() if line.count("|") == 4}
    assert "1.25 (missed)" in lines["1.05 at most"]
    assert "1.50 |" in lines["1.3 at least"]
    assert "44.00 |" in lines["under 48"]
    assert page.NOT_YET in lines["0.85 at least"]
    assert "44.0 (41.0)" in text, "GB and GiB"
    assert "`decode`: stopped after 90 s" in text
    assert "H100; versions unknown; commit abc" in text


def test_the_page_of_the_documentation_has_a_place_for_it():
    text = measure.PAGE.read_text()
    assert text.index("<!-- gpu_day -->") < text.index("<!-- /gpu_day -->")


MEASURED = [each.name for each in CELLS if not each.name.startswith("tests_")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The records of all cells with tiny shapes, and the folder; those that run this suite's tests find none here."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpu_day")
    only = f"--only={','.join(MEASURED)}"
    run = run_python("-m", "benchmarks.gpu_day", "--small", f"--state={folder}", only)
    return {record["cell"]: record for record in results.read(folder)}, folder, run.stdout + run.stderr


@pytest.mark.slow
def test_every_cell_runs_with_small_shapes(small):
    records, _, output = small
    assert [*records] == MEASURED
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(records, "ok"), output
    assert all(record["rows"] for record in records.values())


@pytest.mark.slow
def test_tables_can_be_made_of_what_cells_report(small):
    records = [record | {"card": record["card"].removesuffix(", small")} for record in small[0].values()]
    text = page.page(records)
    for each in CELLS:
        assert each.name not in page.TABLES or each.name not in MEASURED or each.about[1:] in text
    goals = page.goals_text(records)
    assert goals.count(page.NOT_YET) == len(page.GOALS) - 1, "of small shapes only the peak has a place among the goals"


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do(small):
    _, folder, _ = small
    before = len(results.read(folder))
    gpu_day.main(["--small", "--state", str(folder), "--only", "card"])
    assert len(results.read(folder)) == before


def test_a_single_cell_prints_its_rows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_cells", "card", "--small"])
    single_cell()
    assert sum(line.startswith(ROW) for line in capsys.readouterr().out.splitlines()) == 3


@pytest.fixture
def on_a_card(monkeypatch):
    monkeypatch.setattr(gpu_day, "card_name", lambda: "a card")
    monkeypatch.setattr(gpu_day, "install_tiles", lambda records: None)


def test_failed_tests_are_printed_although_their_cell_ran(tmp_path, on_a_card, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day, "Day", lambda _, out, *rest: Scripted(out, {"tests_optim": row(failure="test_a: no")}))
    assert gpu_day.main(["--state", str(tmp_path), "--only", "tests_optim"]) == 0
    assert "tests_optim: ok" in (printed := capsys.readouterr().out)
    assert "    test_a: no\n" in printed


def test_a_new_machine_checks_the_kernels_before_its_first_cell(tmp_path, on_a_card, monkeypatch):
    checked = []
    monkeypatch.setattr(gpu_day, "check_kernels", lambda: checked.append(True))
    monkeypatch.setattr(gpu_day, "Day", lambda _, out, *rest: Scripted(out, {}))
    for cell in ("check", "check", "card"):  # the cell "check" does so itself; the second time nothing is left
        assert not checked
        assert gpu_day.main(["--state", str(tmp_path), "--any-commit", "--only", cell]) == 0
    assert checked == [True]


def test_a_card_on_which_the_kernels_do_not_run_is_an_error_at_once(monkeypatch):
    monkeypatch.setattr(card, "describe", lambda device: "plain torch")
    monkeypatch.setattr(card, "backend", lambda device: eager)
    monkeypatch.setattr(card, "properties", lambda device: {})
    rows = card.measure(torch.device("cuda", 0), small=True)
    assert next(rows)["kernels"] == "plain torch"
    with pytest.raises(RuntimeError, match="run in plain torch on this card"):
        next(rows)


def test_cells_are_listed_and_unknown_ones_refused(capsys):
    assert gpu_day.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(each.name in listed and each.estimate <= each.limit for each in CELLS)
    with pytest.raises(SystemExit):
        gpu_day.main(["--only", "no_such_cell"])
    assert "no_such_cell" in capsys.readouterr().err


@pytest.mark.slow
def test_deferred_logits_are_measured_and_planned(capsys):
    pytest.importorskip("transformers")
    deferred_logits.main(["--steps", "1", "--threads", "1", "--batch", "1", "--length", "64", "--layers", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "logits |" in line]
    (_, real, _, _, _, _, real_loss), (_, ours, _, _, _, _, our_loss) = rows
    assert float(ours) < float(real)
    assert float(our_loss.strip(" |")) == pytest.approx(float(real_loss.strip(" |")), rel=1e-3)


def test_what_a_decoder_layer_keeps_is_listed_by_module():
    """q, k and v share one bf16 input; each has x A^T and a seed of its own."""
    pytest.importorskip("transformers")
    sizes = argparse.Namespace(tokens=8, hidden=64, intermediate=128, heads=4, kv_heads=2, r=4)
    with FakeTensorMode():
        rows = {name: sizes for name, *sizes in saved_tensors.saved_by_module(*saved_tensors.decoder_layer(sizes))}
    x = 8 * 64 * 2
    adapter = 8 * 4 * 2 + 8
    assert rows["self_attn.q_proj"][:2] == [x + adapter, 0]
    assert rows["self_attn.k_proj"][:2] == rows["self_attn.v_proj"][:2] == [adapter, x]
    assert rows["mlp.down_proj"][:2] == [8 * 128 * 2 + adapter, 0]


@pytest.mark.slow
def test_checkpoints_move_between_one_device_and_shards():
    pytest.importorskip("transformers")
    from benchmarks import checkpoint_moves

    names = ["one", "fsdp2"]
    cells = checkpoint_moves.measure(names)
    pairs, contents, optimizers = 4, 2, 2
    shards = contents  # loaded by the strategy that writes them; each pair has a file
    assert sum(map(len, cells.values())) == optimizers * (pairs * contents + shards)
    assert all(float(cell) < 1e-4 for row in cells.values() for cell in row)
    assert checkpoint_moves.table(names, cells).count("\n") == 5


@pytest.mark.slow
def test_seven_billion_runs_with_a_tiny_shape(tmp_path):
    pytest.importorskip("bitsandbytes")
    run = run_python("-m", "benchmarks.seven_billion", "--size", "tiny", "--steps", "2", "--folder", tmp_path)
    rows = [line.split(" | ") for line in run.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| lightning_qlora", "| PEFT + bitsandbytes"]
    ours, theirs = ([float(loss) for loss in row[-1].rstrip(" |").split(", ")] for row in rows)
    assert ours[0] == pytest.approx(theirs[0], abs=0.02)  # the same weights and the same batch
    assert ours[1] < ours[0]
