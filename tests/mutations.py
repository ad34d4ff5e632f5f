"""Which single changes of the package do the tests notice? Mutants drawn by lot, each line equally likely.

    make mutations N=100 SEED=1

The first run records with coverage.py which tests execute which line. Later runs record only the files of tests that
have changed since, and find the lines of the package by a diff. Each mutant runs the tests that execute its line, the
quickest first, until one fails that passes without the mutant. The work is done on a copy of the repository. mutmut
and cosmic-ray do not fit: the one calls each function through another, which torch.compile, Triton and `inspect` see,
and the other runs the whole command of the tests for each mutant.
"""

import argparse
import ast
import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from difflib import SequenceMatcher
from importlib import import_module
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_qlora"
RECORD = ROOT / "outputs" / "mutations.json"
COVERAGE = """[run]
source = lightning_qlora
parallel = true
context = ${PYTEST_CURRENT_TEST-}
data_file = %s
patch = _exit
"""  # processes that a test starts have its name, and some end with os._exit
# Mutants that change nothing: path, the line, what stands in its place -> why. At most five.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "lightning_qlora/kernels/cpu/matmul_16bit.py",
        'x, weight = (torch.ones(rows, WIDTH, dtype=torch.float32, device="cpu") for rows in (ROWS, WIDTH))',
        "torch.ones(rows, WIDTH, dtype=torch.float32)",
    ): "it runs in a new thread, and the default device of another thread does not apply there",
}
# They read the package's files, so that no line of these is executed in their name.
READERS = {
    f"tests/test_default_device.py::test_every_tensor_of_the_package_is_made_with_a_{word}"
    for word in ("device", "type")
}
BATCHES = (8, 64, sys.maxsize)  # most mutants fail a quick test, before the other files of tests are imported
PASSES, FAILS, TOO_LONG = "passes", "fails", "too long"


class Mutant(NamedTuple):
    """A change of one expression or statement.

    Attributes:
        path: Of the file.
        lines: Where to look for tests that execute it: its line, its statement's, that of each block of its function.
        once: Whether only the first test executes it: when the file is imported, or in a function with a cache.
        span: First and last byte in the file.
        text: What stands there instead.
    """

    path: str
    lines: tuple[int, ...]
    once: bool
    span: tuple[int, int]
    text: str

    def applied(self, content: bytes) -> bytes:
        return content[: self.span[0]] + self.text.encode() + content[self.span[1] :]

    def diff(self, content: bytes) -> str:
        before = content.decode().splitlines()
        after = self.applied(content).decode().splitlines()
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


def without_effect(node: ast.AST, part: ast.AST) -> bool:
    """Whether it is an argument of which no result depends: the line of a warning, and zip's check of equal lengths."""
    name = getattr(part, "arg", None) if isinstance(node, ast.Call) else None
    return name == "stacklevel" or (name == "strict" and ast.unparse(node.func) == "zip")


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
            if keyword.arg is not None and not without_effect(node, keyword):
                others = [each for each in node.keywords if each is not keyword]
                yield node, ast.unparse(ast.Call(node.func, node.args, others))


def mutants(path: str, content: bytes) -> list[Mutant]:
    """All mutants of a file: not of annotations, messages, and what only a type checker reads."""
    starts = [0]
    for line in content.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    found = []

    def visit(node: ast.AST, lines: tuple[int, ...], once: bool) -> None:
        if isinstance(node, (ast.JoinedStr, ast.AnnAssign)) and getattr(node, "value", None) is None:
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("TypeVar", "cast"):
            return
        if hasattr(node, "lineno") and not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines = (node.lineno, *lines)
        for replaced, text in changed(node):
            begin = starts[replaced.lineno - 1] + replaced.col_offset
            end = starts[replaced.end_lineno - 1] + replaced.end_col_offset
            found.append(Mutant(path, (replaced.lineno, *lines), once, (begin, end), text))
        if isinstance(node, ast.Raise):
            return
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            inside = once
            if isinstance(node, ast.FunctionDef) and name == "body":
                inside = any(re.search(r"\bcache\b|lru_cache", ast.unparse(each)) for each in node.decorator_list)
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not without_effect(node, child):
                    visit(child, lines, inside)

    visit(ast.parse(content), (), True)
    return found


def draw(root: Path, count: int, seed: int) -> list[Mutant]:
    """Mutants drawn by lot: first a line, of those that have any, then one of its mutants."""
    lines: dict[tuple[str, int], list[Mutant]] = defaultdict(list)
    for path in sorted((root / PACKAGE).rglob("*.py")):
        for mutant in mutants(str(path.relative_to(root)), path.read_bytes()):
            lines[mutant.path, mutant.lines[0]].append(mutant)
    lot = random.Random(seed)
    return [lot.choice(lines[line]) for line in lot.sample([*lines], min(count, len(lines)))]


class Record:
    """The tests that execute a line, and how long each takes.

    Attributes:
        texts: Path -> the lines of each file of the package and of each file of tests when it was recorded.
        seconds: Test that passed -> its seconds.
        tests: Path -> line -> the tests that execute it.
    """

    def __init__(self, stored: dict) -> None:
        names = [*stored.get("seconds", {})]
        self.texts: dict[str, list[str]] = stored.get("texts", {})
        self.seconds: dict[str, float] = stored.get("seconds", {})
        self.tests: dict[str, dict[int, set[str]]] = {
            path: {int(line): {names[i] for i in those} for line, those in lines.items()}
            for path, lines in stored.get("tests", {}).items()
        }

    def stored(self) -> dict:
        number = {name: i for i, name in enumerate(self.seconds)}
        tests = {
            path: {line: sorted(number[test] for test in those if test in number) for line, those in lines.items()}
            for path, lines in self.tests.items()
        }
        return {"texts": self.texts, "seconds": self.seconds, "tests": tests}

    def follow(self, texts: dict[str, list[str]]) -> list[str]:
        """Give each line its number in `texts`; the files of tests that changed, which are forgotten."""
        for path, lines in self.tests.items():
            matcher = SequenceMatcher(None, self.texts[path], texts.get(path, []), autojunk=False)
            same = [(a + i + 1, b + i + 1) for a, b, size in matcher.get_matching_blocks() for i in range(size)]
            self.tests[path] = {after: lines[before] for before, after in same if before in lines}
        stale = [path for path in texts if Path(path).name.startswith("test_") and texts[path] != self.texts.get(path)]
        gone = {*stale, *(self.texts.keys() - texts.keys())}
        self.seconds = {test: spent for test, spent in self.seconds.items() if test.split("::")[0] not in gone}
        self.texts = {path: lines for path, lines in texts.items() if path not in stale}
        return stale

    def add(self, folder: Path) -> None:
        """Add what pytest and coverage.py wrote to a folder."""
        from coverage import CoverageData
        from coverage.exceptions import DataError

        of_file = defaultdict(set)
        for case in ET.parse(folder / "times.xml").iter("testcase"):
            if not len(case):  # neither failed nor skipped
                module, _, rest = case.get("classname", "").partition(".Test")
                path = module.replace(".", "/") + ".py"
                test = "::".join([path, *(["Test" + rest] if rest else []), case.get("name", "")])
                self.seconds[test] = float(case.get("time", 0))
                of_file[path].add(test)
        for file in folder.glob("data*"):
            data = CoverageData(str(file))
            try:
                data.read()
            except DataError:
                continue  # of a process that a test killed
            for name in data.measured_files():
                lines = self.tests.setdefault(name[name.rindex(f"{PACKAGE}/") :], {})
                for line, contexts in data.contexts_by_lineno(name).items():
                    for context in filter(None, contexts):
                        test = context.split("|")[0].split(" (")[0]
                        # A fixture of the whole file is executed in the name of the first test that asks for it.
                        shared = context.endswith(("|setup", " (setup)"))
                        lines.setdefault(line, set()).update(of_file[test.split("::")[0]] if shared else {test})

    def of(self, mutant: Mutant) -> list[str]:
        """The tests of the line or of what is around it, at last of the file; the quickest first."""
        lines = self.tests.get(mutant.path, {})
        places = () if mutant.once else mutant.lines
        around = ([test for test in lines.get(line, ()) if test in self.seconds] for line in places)
        chosen = next(filter(None, around), None) or {*chain.from_iterable(lines.values())} & self.seconds.keys()
        slowest: dict[str, float] = {}  # of each file: its setup may be a fixture that others of the file need too
        for test, seconds in self.seconds.items():
            file = test.split("::")[0]
            slowest[file] = max(seconds, slowest.get(file, 0))
        chosen = {*chosen, *(READERS & self.seconds.keys())}
        if mutant.path.startswith(f"{PACKAGE}/kernels/triton/"):  # the emulator runs machine code, not these lines
            chosen |= {test for test in self.seconds if test.startswith("tests/emulator/")}
        return sorted(chosen, key=lambda test: (self.seconds[test] + slowest[test.split("::")[0]] / 10, test))


def collected(folder: str, files: list[str]) -> list[str]:
    """The files that pytest collects in a folder: one that is named is collected although its conftest ignores it."""
    ignored: list[str] = []
    if (ROOT / folder / "conftest.py").exists():
        conftest = import_module(f"{folder.replace('/', '.')}.conftest")
        ignored = getattr(conftest, "collect_ignore", [])
    return [path for path in files if Path(path).name not in ignored]


def recorded(file: Path) -> Record:
    """The record of the tests, made or brought up to date."""
    record = Record(json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})
    sources = sorted(path for name in (PACKAGE, "tests") for path in (ROOT / name).rglob("*.py"))
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").splitlines() for path in sources}
    for name, files in groupby(record.follow(texts), os.path.dirname):
        stale = [*files]
        if run := collected(name, stale):
            add_run(record, run)
        record.texts |= {path: texts[path] for path in stale}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record.stored()))
    return record


def add_run(record: Record, files: list[str]) -> None:
    """Run files of tests and add what they execute."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "coverage.ini"
        settings.write_text(COVERAGE % (Path(folder) / "data"))
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--cov", f"--cov-config={settings}",
             "--cov-report=", "--cov-context=test", f"--junitxml={folder}/times.xml", *files],
            cwd=ROOT, env={**os.environ, "COVERAGE_PROCESS_START": str(settings)},
        )  # fmt: skip
        record.add(Path(folder))


class Copy:
    """A copy of the repository, in which tests run in forks of this process, which has imported the large libraries."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "copy"
        ignored = shutil.ignore_patterns(".git", ".venv*", "outputs", "__pycache__", "site")
        shutil.copytree(ROOT, self.folder, ignore=ignored, symlinks=True)
        self.good: set[str] = set()  # pass without a mutant
        self.bad: set[str] = set()

    def run(self, tests: list[str], limit: float) -> tuple[str, str]:
        """PASSES, FAILS or TOO_LONG, and the first test that fails, if one was started."""
        name = self.folder / "failed.txt"
        name.write_text("")
        pid = os.fork()
        if not pid:
            code = 1
            try:
                output = os.open(self.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.setsid()
                os.chdir(self.folder)
                for module in [
                    each for each in sys.modules if each.partition(".")[0] in (PACKAGE, "tests", "benchmarks")
                ]:
                    del sys.modules[module]
                sys.path[:] = [str(self.folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
                os.environ["PYTHONPATH"] = str(self.folder)
                import pytest

                class Failed:
                    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                        if report.failed:
                            name.write_text(report.nodeid)

                arguments = ["-x", "-q", "-p", "no:cacheprovider", f"--timeout={limit}"]
                code = int(pytest.main([*arguments, *tests], plugins=[Failed()]))
            finally:
                os._exit(code)
        end = time.monotonic() + limit
        while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
            time.sleep(0.05)
        with suppress(ProcessLookupError):  # also what the tests started
            os.killpg(pid, signal.SIGKILL)
        if done == (0, 0):
            os.waitpid(pid, 0)
            return TOO_LONG, ""
        return FAILS if done[1] else PASSES, name.read_text(encoding="utf-8")

    def result(self, mutant: Mutant, tests: list[tuple[str, float]]) -> tuple[str, str]:
        """As `run`, of tests with their seconds; a test that fails without the mutant too is left out from then on."""
        file = self.folder / mutant.path
        original = file.read_bytes()
        for begin, end in zip((0, *BATCHES), BATCHES, strict=False):
            while batch := [each for each in tests[begin:end] if each[0] not in self.bad]:
                names = [name for name, _ in batch]
                limit = 120 + 20 * sum(seconds for _, seconds in batch)
                file.write_bytes(mutant.applied(original))
                verdict, test = self.run(names, limit)
                file.write_bytes(original)
                if verdict == PASSES:
                    break
                suspects = [test] if test else names
                if self.good.issuperset(suspects):
                    return verdict, test
                alone, other = self.run(suspects, limit)
                if alone == PASSES:
                    self.good.update(suspects)
                    return verdict, test
                # pytest names a test that is gone without its parameters.
                gone = re.findall(r"not found: \S+?/copy/([^\[\n]+)", (self.folder / "output.txt").read_text())
                missing = [name for name in suspects if name.partition("[")[0] in gone]
                self.bad.update([other] if other else missing or suspects)
        return PASSES, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="mutants of paths that begin so")
    parser.add_argument("--seconds", type=float, default=600.0, help="of tests for one mutant, as they were recorded")
    parser.add_argument("--record", type=Path, default=RECORD, help="file of the record")
    chosen = parser.parse_args()
    record = recorded(chosen.record)
    os.environ["OMP_NUM_THREADS"] = "1"
    for library in ("lightning.pytorch", "transformers", "peft", "bitsandbytes"):  # the forks have them
        import_module(library)

    valid: Counter[str] = Counter()
    found: Counter[str] = Counter()
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        there = Copy(Path(temporary))
        for number, mutant in enumerate(draw(there.folder, chosen.count, chosen.seed)):
            content = (there.folder / mutant.path).read_bytes()
            line = content.decode().splitlines()[mutant.lines[0] - 1].strip()
            if not mutant.path.startswith(tuple(chosen.only)) or (mutant.path, line, mutant.text) in EQUIVALENT:
                continue
            total, tests = 0.0, []
            for test in record.of(mutant):
                total += record.seconds[test]
                if total > chosen.seconds and tests:
                    break
                tests.append((test, record.seconds[test]))
            start = time.monotonic()
            verdict, test = there.result(mutant, tests)
            part = mutant.path.split("/")[1]
            valid[part] += 1
            found[part] += verdict != PASSES
            result = "SURVIVED" if verdict == PASSES else f"noticed, {verdict}: {test}"
            spent = time.monotonic() - start
            print(f"{number} {result} ({len(tests)} tests, {spent:.0f} s)\n{mutant.diff(content)}", flush=True)
            if verdict == PASSES:
                survivors.append(mutant.diff(content))
    print(f"\nnoticed: {sum(found.values())} of {sum(valid.values())} (seed {chosen.seed})")
    for part in sorted(valid):
        print(f"  {part:20}{found[part]:4} of {valid[part]}")
    print("\nsurvivors:", *survivors, sep="\n")
    print("\nleft out, as they fail without a mutant:", *sorted(there.bad), sep="\n")


if __name__ == "__main__":
    main()
