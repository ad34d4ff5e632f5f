"""Every code block of docs/*.md, README.md and public docstrings runs; tests/scripts/doc_blocks.py says how."""

import dataclasses
import inspect
import json
import re
from textwrap import dedent

import pytest

import lightning_qlora
from lightning_qlora import QLoRAConfig
from tests.conftest import ROOT, run_python
from tests.scripts.doc_blocks import blocks, make_hub

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

PAGES = {page.name: page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
RUN = [name for name, page in PAGES.items() if any(b.kind in ("python", "diff", "bash") for b in blocks(page))]
COMING_FROM = PAGES["coming-from.md"].read_text(encoding="utf-8").split("\n## ")[1:]


def test_every_block_of_every_page_runs(tmp_path):
    """All pages in one process: each of its own would import torch again. A docstring's example is a page."""
    pages = [PAGES[name] for name in RUN]
    for name in lightning_qlora.__all__:
        example = inspect.getdoc(getattr(lightning_qlora, name)).partition("\nExample:\n")[2]
        pages.append(tmp_path / f"{name}.example.md")
        pages[-1].write_text(dedent(example) + "\n", encoding="utf-8")
    # Lightning prints characters with rich that the locale may not have.
    run_python("-m", "tests.scripts.doc_blocks", tmp_path, *pages, PYTHONIOENCODING=":replace")
    results = json.loads((tmp_path / "results.json").read_text())
    assert [*results] == [page.name for page in pages]
    assert {name: page["error"] for name, page in results.items() if page["error"]} == {}
    assert {name for name, page in results.items() if not page["run"]} <= {*RUN}, "a public name without an example"
    assert sum(page["exempt"] for page in results.values()) <= 3
    assert sum(page["run"] for page in results.values()) > 40


@pytest.mark.slow
def test_the_script_of_the_readme_trains_with_workers_that_import_it(tmp_path):
    """As with `num_workers=2` from Python 3.14 on, on Macs and on Windows."""
    (script,) = [block.code for block in blocks(ROOT / "README.md") if block.kind == "python"]
    loader, epochs = "DataLoader(texts, batch_size=8, shuffle=True", "max_epochs=5"
    assert loader in script
    assert epochs in script
    workers = 'num_workers=2, multiprocessing_context="forkserver"'
    script = script.replace(loader, f"{loader}, {workers}").replace(epochs, "max_epochs=1")  # each starts its workers
    (tmp_path / "script.py").write_text(script)
    make_hub(tmp_path)
    run_python("script.py", folder=tmp_path, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert (tmp_path / "tuned.ckpt").exists()


def test_every_script_with_a_module_of_its_own_has_a_guard():
    scripts = [
        b for page in PAGES.values() for b in blocks(page) if b.kind == "python" and "LightningModule)" in b.code
    ]
    trains = [block for block in scripts if re.search(r"\.fit\(", block.code)]
    assert len(trains) >= 3
    assert not [(block.page, block.line) for block in trains if 'if __name__ == "__main__":' not in block.code]


def test_titles_of_files_are_unique():
    titles = [block.title for page in PAGES.values() for block in blocks(page) if block.title]
    assert "my_module.py" in titles and len(titles) == len(set(titles))


@pytest.mark.parametrize("section", COMING_FROM, ids=lambda section: section.partition("\n")[0])
def test_the_tables_name_arguments_that_exist(section):
    """In the right column of "Coming from"."""
    ours = {field.name for field in dataclasses.fields(QLoRAConfig)}
    rows = re.findall(r"^\| .+ \| (.+) \|$", section, re.M)
    named = {word for row in rows for word in re.findall(r"`(\w+)(?:=[^`]*)?`", row)}
    assert len(named & ours) >= 5
    assert all(
        hasattr(lightning_qlora, word) for word in named if word.startswith(("Paged", "save_", "merge", "load_"))
    )
