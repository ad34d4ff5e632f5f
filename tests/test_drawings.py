"""The drawings of the documentation are those that docs/drawings/draw.py makes."""

import runpy
import xml.etree.ElementTree as ElementTree

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "drawings"
DRAWINGS = runpy.run_path(str(FOLDER / "draw.py"))["DRAWINGS"]


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_file_is_current(name):
    drawing = DRAWINGS[name]()
    ElementTree.fromstring(drawing)
    assert (FOLDER / f"{name}.svg").read_text() == drawing, "run python docs/drawings/draw.py"


def test_each_drawing_is_shown():
    pages = "".join(page.read_text() for page in [*(ROOT / "docs").glob("*.md"), ROOT / "mkdocs.yml"])
    shown = {name for name in DRAWINGS if f"drawings/{name}.svg" in pages}
    assert shown == set(DRAWINGS) == {path.stem for path in FOLDER.glob("*.svg")}
