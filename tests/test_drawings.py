"""The drawings of the documentation are those that docs/drawings/draw.py makes."""

import re
import runpy
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from lightning.pytorch import Callback

from lightning_qlora import QLoRAPrecision, merge
from tests.conftest import ROOT, Classifier, loader, make_trainer

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


class Calls:
    """File and name of each function of the package that is called, in the order of first calls."""

    def __init__(self):
        self.names = {}

    def __enter__(self):
        sys.setprofile(self.add)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def add(self, frame, event, _):
        file = frame.f_code.co_filename.replace("\\", "/")
        if event == "call" and "/lightning_qlora/" in file:
            self.names.setdefault((file.rpartition("/lightning_qlora/")[2], frame.f_code.co_name))


class OneBatch(Callback):
    def __init__(self):
        self.calls = Calls()

    def on_train_batch_start(self, *_):
        self.calls.__enter__()

    def on_train_batch_end(self, *_):
        self.calls.__exit__()


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Name of a drawing -> the calls of what it shows, on one CPU device."""
    path = tmp_path_factory.mktemp("run")
    batch = OneBatch()

    def make(**arguments):
        return make_trainer(path, plugins=QLoRAPrecision(r=4), limit_train_batches=1, **arguments)

    run = make(callbacks=[batch])
    module = Classifier()
    run.fit(module, loader())
    with Calls() as save:
        run.save_checkpoint(path / "run.ckpt")
    with Calls() as load:
        make().fit(Classifier(), loader(), ckpt_path=path / "run.ckpt")
    with Calls() as merged:
        merge(module)
    stops = {"conversion": load, "batch": batch.calls, "save": save, "load": load, "merge": merged}
    return {f"stops_{name}": of_calls for name, of_calls in stops.items()}


@pytest.mark.parametrize("name", SCRIPT["STOPS"])
def test_a_run_calls_each_stop_in_this_order(name, calls):
    stops = [(file, function) for file, function, _ in SCRIPT["STOPS"][name]]
    assert len(stops) <= 8
    assert [call for call in calls[name].names if call in stops] == stops
