"""Which single changes of the package do the tests notice? Mutants drawn by lot, each line equally likely.

    make mutations N=100 SEED=1

The first run records which tests execute which line (one run of all tests, with coverage.py); later runs use the record
as long as the package and the tests stay as they are. Each mutant runs the tests that execute its line, the quickest
first, until one fails. mutmut and cosmic-ray do not fit: the one calls each function through another, which
torch.compile, Triton and `inspect` see, and the other runs the whole command of the tests for each mutant.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_qlora"
RECORD = ROOT / "outputs" / "mutations"
COVERAGE = """[run]
source = lightning_qlora
parallel = true
context = ${PYTEST_CURRENT_TEST-}
data_file = %s
patch = _exit
"""  # processes that a test starts have its name, and some end with os._exit
# Mutants that change nothing: path, the line, what stands in its place -> why. At most five.
EQUIVALENT: dict[tuple[str, str, str], str] = {}


class Mutant(NamedTuple):
    """A change of one expression or statement.

    Attributes:
        path: Of the file.
        lines: Where to look for tests that execute it: its line, its statement's, that of each block around it.
        span: First and last byte in the file.
        text: What stands there instead.
    """

    path: str
    lines: tuple[int, ...]
    span: tuple[int, int]
    text: str

    def source(self) -> str:
        original = (ROOT / self.path).read_bytes()
        return (original[: self.span[0]] + self.text.encode() + original[self.span[1] :]).decode()

    def diff(self) -> str:
        before = (ROOT / self.path).read_text().splitlines()
        after = self.source().splitlines()
        first = next(i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1])
        last = 1
        while before[-last] == after[-last]:
            last += 1
        changed = [f"    - {line.strip()}" for line in before[first : len(before) - last + 1]]
        changed += [f"    + {line.strip()}" for line in after[first : len(after) - last + 1]]
        return "\n".join([f"{self.path}:{first + 1}", *changed])


SWAPS = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitXor, ast.BitXor: ast.BitAnd,
}  # fmt: skip


def changed(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Changes at a node: the node that is replaced, and its text."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield node, ast.unparse(ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators))
    elif isinstance(node, (ast.BoolOp, ast.BinOp)) and type(node.op) in SWAPS:
        other = copy.copy(node)
        other.op = SWAPS[type(node.op)]()
        yield node, f"({ast.unparse(other)})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield node, repr(value)
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, ast.comprehension):
        yield from ((test, "True") for test in node.ifs)
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield node.value, "None"
    elif (
        isinstance(node, (ast.Raise, ast.AugAssign, ast.Delete, ast.Continue, ast.Break))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        or (isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript)))
    ):
        yield node, "pass"
    elif isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg not in (None, "stacklevel"):
                others = [each for each in node.keywords if each is not keyword]
                yield node, ast.unparse(ast.Call(node.func, node.args, others))


def mutants(path: Path) -> list[Mutant]:
    """All mutants of a file: not of annotations, messages, and what only a type checker reads."""
    content = path.read_bytes()
    starts = [0]
    for line in content.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    found = []

    def visit(node: ast.AST, lines: tuple[int, ...]) -> None:
        if isinstance(node, (ast.JoinedStr, ast.AnnAssign)) and getattr(node, "value", None) is None:
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.stmt) or hasattr(node, "lineno"):
            lines = (node.lineno, *lines)
        for replaced, text in changed(node):
            begin = starts[replaced.lineno - 1] + replaced.col_offset
            end = starts[replaced.end_lineno - 1] + replaced.end_col_offset
            found.append(Mutant(str(path.relative_to(ROOT)), (replaced.lineno, *lines), (begin, end), text))
        if isinstance(node, (ast.Raise, ast.JoinedStr)):
            return
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child, lines)

    visit(ast.parse(content), ())
    return found


def draw(count: int, seed: int) -> list[Mutant]:
    """Mutants drawn by lot: first a line, of those that have any, then one of its mutants."""
    lines: dict[tuple[str, int], list[Mutant]] = defaultdict(list)
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        for mutant in mutants(path):
            lines[mutant.path, mutant.lines[0]].append(mutant)
    lot = random.Random(seed)
    return [lot.choice(lines[line]) for line in lot.sample([*lines], min(count, len(lines)))]


class Tests:
    """The tests that execute a line, and how long each takes."""

    def __init__(self, record: dict) -> None:
        self.seconds: dict[str, float] = record["seconds"]
        self.of_lines: dict[str, dict[str, list[str]]] = record["lines"]

    def of(self, mutant: Mutant) -> list[str]:
        """Those of the line or of what is around it, at last of the file; the quickest first."""
        lines = self.of_lines.get(mutant.path, {})
        for line in mutant.lines:
            if chosen := [test for test in lines.get(str(line), ()) if test in self.seconds]:
                break
        else:
            chosen = [test for test in {*chain.from_iterable(lines.values())} if test in self.seconds]
        return sorted(chosen, key=lambda test: (self.seconds[test], test))


def recorded(folder: Path, fresh: bool = True) -> Tests:
    """The record of the tests; it is made anew if the package or the tests have changed since."""
    sources = sorted(path for name in (PACKAGE, "tests") for path in (ROOT / name).rglob("*.py"))
    state = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    file = folder / "record.json"
    if not file.exists() or (fresh and json.loads(file.read_text())["state"] != state):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings = folder / "coverage.ini"
        settings.write_text(COVERAGE % (folder / "data"))
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--cov", f"--cov-config={settings}", "--cov-report=",
             "--cov-context=test", f"--junitxml={folder / 'times.xml'}"],
            cwd=ROOT, env={**os.environ, "COVERAGE_PROCESS_START": str(settings)},
        )  # fmt: skip
        file.write_text(json.dumps({"state": state, **read_record(folder)}))
    return Tests(json.loads(file.read_text()))


def read_record(folder: Path) -> dict:
    """Tests that passed with their seconds, and path -> line -> tests."""
    from coverage import CoverageData

    seconds = {}
    for case in ET.parse(folder / "times.xml").iter("testcase"):
        if not len(case):  # neither failed nor skipped
            module, _, rest = case.get("classname", "").partition(".Test")
            parts = [module.replace(".", "/") + ".py", *(["Test" + rest] if rest else []), case.get("name", "")]
            seconds["::".join(parts)] = float(case.get("time", 0))
    lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for data_file in folder.glob("data*"):
        data = CoverageData(str(data_file))
        data.read()
        for name in data.measured_files():
            path = name[name.rindex(f"{PACKAGE}/") :]
            for line, contexts in data.contexts_by_lineno(name).items():
                lines[path][line] |= {context.split("|")[0].split(" (")[0] for context in contexts} - {""}
    kept = {path: {line: sorted(tests) for line, tests in there.items() if tests} for path, there in lines.items()}
    return {"seconds": seconds, "lines": kept}


def noticed(mutant: Mutant, tests: list[str], folder: Path, limit: float) -> bool:
    """Whether a test fails with a mutant; `folder` is a copy of the repository.

    The tests run in a fork of this process, which has imported the large libraries.
    """
    file = folder / mutant.path
    original = file.read_text()
    file.write_text(mutant.source())
    pid = os.fork()
    if not pid:
        code = 1
        try:
            output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.setsid()
            os.chdir(folder)
            for name in [name for name in sys.modules if name.partition(".")[0] in (PACKAGE, "tests", "benchmarks")]:
                del sys.modules[name]
            sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
            os.environ["PYTHONPATH"] = str(folder)
            import pytest

            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--timeout=300", *tests]))
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.05)
    if done == (0, 0):
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    file.write_text(original)
    return done == (0, 0) or done[1] != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="mutants of paths that begin so")
    parser.add_argument("--seconds", type=float, default=600.0, help="of tests for one mutant, as they were recorded")
    parser.add_argument("--record", type=Path, default=RECORD, help="folder of the record")
    parser.add_argument("--keep-record", action="store_true", help="also if the package has changed since")
    chosen = parser.parse_args()
    tests = recorded(chosen.record, not chosen.keep_record)
    os.environ["OMP_NUM_THREADS"] = "1"
    import_module("lightning.pytorch")  # the forks have them
    import_module("transformers")

    valid: Counter[str] = Counter()
    found: Counter[str] = Counter()
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "outputs", "__pycache__", "site")
        shutil.copytree(ROOT, folder, ignore=ignored, symlinks=True)
        for number, mutant in enumerate(draw(chosen.count, chosen.seed)):
            if not mutant.path.startswith(chosen.only):
                continue
            line = (ROOT / mutant.path).read_text().splitlines()[mutant.lines[0] - 1].strip()
            if (mutant.path, line, mutant.text) in EQUIVALENT:
                continue
            part = mutant.path.split("/")[1]
            valid[part] += 1
            total, those = 0.0, []
            for test in tests.of(mutant):
                total += tests.seconds[test]
                if total > chosen.seconds and those:
                    break
                those.append(test)
            start = time.monotonic()
            good = bool(those) and noticed(mutant, those, folder, 60 + 20 * min(total, chosen.seconds))
            found[part] += good
            result = "noticed" if good else "SURVIVED"
            print(
                f"{number} {result}, {len(those)} tests, {time.monotonic() - start:.0f} s\n{mutant.diff()}", flush=True
            )
            if not good:
                survivors.append(mutant)
    print(f"\nnoticed: {sum(found.values())} of {sum(valid.values())} (seed {chosen.seed})")
    for part in sorted(valid):
        print(f"  {part:20}{found[part]:4} of {valid[part]}")
    print("\nsurvivors:", *(mutant.diff() for mutant in survivors), sep="\n")


if __name__ == "__main__":
    main()
