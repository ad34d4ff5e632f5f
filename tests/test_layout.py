"""Lists of targets and mutants are those of today."""

import re

from tests.mutations import EQUIVALENT, mutants
from tests.test_docs import PACKAGE


def test_make_test_all_runs_every_target():
    makefile = (PACKAGE.parent / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)", makefile, re.M)[1].split())
    targets -= {"help", "setup", "clean", "constraints", "test-all"}
    commands = re.search(r"^test-all:(.*?)\n\n", makefile, re.M | re.S)[1]
    assert targets - {"test"} <= set(commands.split())  # of `test` it has the lint and the tests


def test_the_mutants_that_change_nothing_are_mutants_of_today():
    for path, line, text in EQUIVALENT:
        content = (PACKAGE.parent / path).read_bytes()
        lines = content.decode().splitlines()
        assert (line, text) in {(lines[each.lines[0] - 1].strip(), each.text) for each in mutants(path, content)}
