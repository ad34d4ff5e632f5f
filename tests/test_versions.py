"""What pyproject.toml and the page of installation say of versions is what tests/record.md says was run."""

import re

import pytest

from tests.conftest import ROOT

versions = pytest.importorskip("tests.versions", reason="needs Python 3.11")
INSTALL = (ROOT / "docs" / "install.md").read_text()


def cells():
    """Name of each environment -> its cells, by the heads of the table."""
    heads = [head.strip() for head in versions.HEAD.splitlines()[0].split("|")[1:-1]]
    table = {name: [cell.strip() for cell in row.split("|")[1:-1]] for name, row in versions.rows().items()}
    return {name: dict(zip(heads, row, strict=True)) for name, row in table.items()}


def ends(head):
    """The lowest and the highest version of a column that were run."""
    column = {row[head] for row in cells().values()}
    ordered = sorted(column, key=lambda version: [int(part) for part in version.partition("+")[0].split(".")])
    return ordered[0], ordered[-1]


def test_every_flow_passed_in_every_environment():
    for name, row in cells().items():
        assert re.fullmatch(r"(\d+) of \1", row["flows that passed"]), name


def test_the_lower_bounds_were_run():
    (lowest,) = [row for name, row in cells().items() if name.startswith("lowest-3.")]
    bounds = dict(each.split("==") for each in versions.lower_bounds())
    assert {"torch", "lightning", "transformers", "numpy", "safetensors", "filelock", "jsonargparse"} <= {*bounds}
    for package in {*bounds} & {*versions.PACKAGES}:
        assert f"{lowest[package]}.".startswith(f"{bounds[package]}."), package
    assert versions.PROJECT["requires-python"] == f">={lowest['Python']}"


def test_the_page_of_installation_and_the_classifiers_name_what_was_run():
    oldest, newest = ends("Python")
    classifiers = [each.rpartition(" ")[2] for each in versions.PROJECT["classifiers"] if ":: Python :: 3." in each]
    assert classifiers[0] == oldest and classifiers[-1] == newest
    assert f"| Python | {oldest} to {newest} |" in INSTALL
    for package in ("torch", "lightning", "transformers"):
        assert f"| {package} | {' to '.join(ends(package))};" in INSTALL
