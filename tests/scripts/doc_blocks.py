"""Runs the code blocks of documentation pages: `python -m tests.scripts.doc_blocks FOLDER PAGE...`.

The blocks of a page run in their order, in one namespace and in a folder of the page's own:

- A block with a title (```python title="my_module.py") is a file. Each page has the files of all pages in its folder.
- `python` blocks are executed. Of a `diff` block, the new side is.
- In `bash` blocks, the lines that call `lightning-qlora` and those that run a file with `python` are.
- `<!-- not run: reason -->` before a block exempts it.

Models of the Hugging Face hub come from a cache folder (HF_HOME) with a small random Llama under each name in HUB.

FOLDER/results.json then holds, for each page, how many blocks were run and exempted, the seconds, and the traceback of
the block that failed.
"""

import json
import os
import re
import runpy
import shlex
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
HUB = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "sentence-transformers/all-MiniLM-L6-v2",
)
COMMIT = "0" * 40
FENCE = re.compile(r"^(?P<skip><!-- not run: .+ -->\n)?```(?P<kind>\w*)(?P<rest>.*)\n(?P<code>(?:.*\n)*?)```$", re.M)
# What pages name and a test can't run: it installs, needs a network or a server, or takes minutes.
PROGRAMS = {
    "pip", "make", "git", "pytest", "vllm", "curl", "hf", "ollama", "llama-cli", "transformers serve", "torchrun",
    "docker", "sbatch", "ray", "export", "cp", "python -m", "python llama.cpp/convert_hf_to_gguf.py",
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        page: Its file name.
        line: Of the first line of code.
        kind: The language of the fence.
        title: File name for which it stands, or "".
        run: False if a comment before the block exempts it.
    """

    page: str
    line: int
    kind: str
    title: str
    code: str
    run: bool


def blocks(page):
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match["rest"])
        line = text.count("\n", 0, match.start("code")) + 1
        name = title[1] if title else ""
        yield Block(page.name, line, match["kind"], name, match["code"], run=not match["skip"])


def make_hub(folder):
    """Write the cache of the hub: one small model, under all names."""
    from tests.toys import chat_model

    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md")]
    model = Path(chat_model(folder / "model", pages))
    for name in HUB:
        repository = folder / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "snapshots").mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        (repository / "snapshots" / COMMIT).symlink_to(model)


def write(files, folder):
    for file in files:
        path = folder / file.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file.code, encoding="utf-8")


def run_block(block, namespace):
    if block.kind in ("python", "diff"):
        code = block.code
        if block.kind == "diff":
            code = "".join(line[2:] or "\n" for line in code.splitlines(True) if not line.startswith("-"))
        exec(compile("\n" * (block.line - 1) + code, block.page, "exec"), namespace)
    elif block.kind == "bash":
        for line in block.code.replace("\\\n", " ").splitlines():
            run_command(shlex.split(line, comments=True))


def run_command(words):
    """Run a line of a shell block, in this process: starting another one for each would take seconds."""
    from lightning_qlora.tools.cli import main

    if not words or {words[0], " ".join(words[:2])} & PROGRAMS:
        return
    try:
        if words[0] == "lightning-qlora":
            main(words[1:])
        elif words[0] == "python" and Path(words[1]).exists():
            sys.argv = words[1:]
            runpy.run_path(words[1], run_name="__main__")
        elif words[0] != "python" or not (ROOT / words[1]).exists():  # tests/test_examples.py runs the examples
            raise ValueError(
                f"{shlex.join(words)}: not a command that pages may use. Add it to PROGRAMS, or run it here."
            )
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"{shlex.join(words)}: exit code {stop.code}") from stop


def run_page(page, files, folder):
    """Run the blocks of a page up to the first that fails."""
    folder.mkdir()
    os.chdir(folder)
    write(files, folder)
    module = sys.modules["__main__"] = ModuleType("__main__")  # where classes of the page say that they are from
    code = [block for block in blocks(page) if block.kind in ("python", "diff", "bash") and not block.title]
    result = {"run": 0, "exempt": sum(not block.run for block in code), "error": ""}
    start = time.perf_counter()
    for block in code:
        if not block.run:
            continue
        try:
            run_block(block, module.__dict__)
        except BaseException:
            result["error"] = f"{block.page}:{block.line}\n{block.code}\n{traceback.format_exc()}"
            break
        result["run"] += 1
    return result | {"seconds": round(time.perf_counter() - start, 1)}


def main(folder, pages):
    os.environ["HF_HOME"], os.environ["HF_HUB_OFFLINE"] = str(folder), "1"
    make_hub(folder)
    files = [block for page in sorted((ROOT / "docs").glob("*.md")) for block in blocks(page) if block.title]
    write(files, folder / "files")
    sys.path.insert(0, str(folder / "files"))
    results = {page.name: run_page(page, files, folder / page.stem) for page in pages}
    (folder / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), [Path(page).absolute() for page in sys.argv[2:]])
