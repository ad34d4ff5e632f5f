"""The Dockerfile and the pinned versions: no image is built, but what it copies exists and the pins fit the package."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

tomllib = pytest.importorskip("tomllib")  # Python 3.11
PINS = [
    Requirement(line)
    for line in (ROOT / "lightning_qlora" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


def test_every_dependency_is_pinned_within_the_range_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(each for name in extras for each in extras[name])]
    needed = [each for each in needed if not each.startswith("lightning-qlora[")]
    ranges = {canonicalize_name(each.name): each.specifier for each in map(Requirement, needed)}
    pins = {canonicalize_name(pin.name): str(pin.specifier) for pin in PINS}
    assert all(re.fullmatch(r"==\d+(\.\w+)+", pin) for pin in pins.values()), pins
    assert ranges.keys() <= pins.keys()
    assert not [name for name, allowed in ranges.items() if not allowed.contains(pins[name].removeprefix("=="))]


def test_what_the_image_copies_exists():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY")]
    assert {"lightning_qlora", "pyproject.toml"} <= {path for paths in copied for path in paths}
    assert all((ROOT / path).exists() for paths in copied for path in paths)
