"""Each file has tests of its name, or contributing.md says where; lists of targets and mutants are those of today."""

import re

from tests.mutations import EQUIVALENT, mutants
from tests.test_docs import FILES, PACKAGE


def test_every_file_has_tests_of_its_name_or_a_row_that_says_where():
    tests = PACKAGE.parent / "tests"
    rows = FILES.split("## Tested elsewhere")[1].split("## ")[0]
    rows = [
        [re.findall(r"`([\w/]+\.py)`", cell) for cell in row.split("|")[1:3]] for row in rows.splitlines() if "`" in row
    ]
    assert not [name for _, named in rows for name in named if not (tests / name).is_file()]
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    elsewhere = {str(path) for path in paths if not (tests / path.parent / f"test_{path.name}").is_file()}
    listed = {path for files, _ in rows for path in files}
    assert listed == elsewhere, (
        f"name in contributing.md, 'Tested elsewhere': {elsewhere - listed}, not: {listed - elsewhere}"
    )


def test_make_test_all_runs_every_target():
    makefile = (PACKAGE.parent / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)", makefile, re.M)[1].split()) - {"help", "setup", "clean", "test-all"}
    commands = re.search(r"^test-all:(.*?)\n\n", makefile, re.M | re.S)[1]
    assert targets - {"test"} <= set(commands.split())  # of `test` it has the lint and the tests


def test_the_mutants_that_change_nothing_are_mutants_of_today():
    for path, line, text in EQUIVALENT:
        content = (PACKAGE.parent / path).read_bytes()
        lines = content.decode().splitlines()
        assert (line, text) in {(lines[each.lines[0] - 1].strip(), each.text) for each in mutants(path, content)}
