"""The results of `benchmarks.gpu_day`: one JSON line per cell, with commit, cell and card as the key."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT

Record = dict[str, Any]
FILE = "gpu_day.jsonl"
PACKAGE = ROOT / "lightning_qlora"
TILES = PACKAGE / "kernels" / "triton" / "tiles.json"


def read(folder: Path) -> list[Record]:
    """The records of a folder, oldest first; an incomplete line is skipped."""
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                print(f"{path}: a line is not valid JSON and is skipped.", file=sys.stderr)
    return records


def save(folder: Path, record: Record) -> None:
    """Append one line and write it to disk."""
    with (folder / FILE).open("a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def done(records: Iterable[Record]) -> set[str]:
    """Names of the cells that succeeded."""
    return {record["cell"] for record in records if record["status"] == "ok"}


def newest(records: Sequence[Record]) -> dict[str, Record]:
    """The last successful record of each cell, else its last failed one; `--small` runs do not count."""
    found: dict[str, Record] = {}
    for record in records:
        before = found.get(record["cell"])
        if not record["card"].endswith(", small") and (
            before is None or record["status"] == "ok" or before["status"] != "ok"
        ):
            found[record["cell"]] = record
    return found


def code_version() -> str:
    """The commit; without git, or if the package has uncommitted changes, a hash of the package's sources.

    tiles.json is ignored, because a cell writes it.
    """
    tiles = TILES.relative_to(ROOT)
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit and _git("status", "--porcelain", "--", "lightning_qlora", f":(exclude){tiles}") == "":
        return commit
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".json", ".c", ".h") and path != TILES:
            digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return f"sources-{digest.hexdigest()[:12]}"


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def card_name() -> str | None:
    """Name of the GPU, or None. Asked in another process, because a CUDA context here would use device memory."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = run.stdout.strip().splitlines()
    return lines[-1] if lines else None


def install_tiles(records: Sequence[Record]) -> None:
    """Write the tiles that the tile search found into the package."""
    record = newest(records).get("tiles")
    texts = [] if record is None else [row["tiles_json"] for row in record["rows"] if "tiles_json" in row]
    if texts and TILES.read_text() != texts[-1]:
        TILES.write_text(texts[-1])
        print(f"{TILES.name}: restored the tiles that were measured before", flush=True)
