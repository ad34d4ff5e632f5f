"""The drawings of the documentation are those that docs/drawings/draw.py makes."""

import re
import runpy
import xml.etree.ElementTree as ElementTree

import pytest

from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "drawings"
SCRIPT = runpy.run_path(str(FOLDER / "draw.py"))
DRAWINGS = SCRIPT["DRAWINGS"]


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_file_is_current(name):
    drawing = DRAWINGS[name]()
    ElementTree.fromstring(drawing)
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == drawing, "run python docs/drawings/draw.py"


def test_the_words_in_a_box_do_not_touch_it():
    """A letter of system-ui is about 0.53 times as wide as its size; the ᵀ of a matrix is narrow."""
    boxes = re.findall(
        r'<rect [^>]*width="([\d.]+)"[^>]*rx="6"[^>]*>(.*)', "".join(draw() for draw in DRAWINGS.values())
    )
    words = [(float(width), text) for width, line in boxes for text in re.findall(r">([^<]+)</text>", line)]
    assert len(words) > 50
    assert [text for width, text in words if 0.53 * 13 * len(text.replace("ᵀ", "")) + 10 > width] == []


def test_each_drawing_is_shown():
    pages = "".join(page.read_text(encoding="utf-8") for page in [*(ROOT / "docs").glob("*.md"), ROOT / "mkdocs.yml"])
    shown = {name for name in DRAWINGS if f"drawings/{name}.svg" in pages}
    assert shown == set(DRAWINGS) == {path.stem for path in FOLDER.glob("*.svg")}


@pytest.mark.parametrize("name", SCRIPT["STOPS"])
def test_each_stop_is_in_the_code(name):
    stops = SCRIPT["STOPS"][name]
    assert len(stops) <= 8
    for file, place, _ in stops:
        source = (ROOT / "lightning_qlora" / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {place}\b", source, re.M), (file, place)
