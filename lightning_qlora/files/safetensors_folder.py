"""Reads safetensors files and folders of them, with errors that name the file and the key; writes such files."""

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_qlora.checks import DAMAGED, shown
from lightning_qlora.files.folder_writer import check_utf8
from lightning_qlora.files.hub import check_name, file_in

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorEntry:
    dtype: str  # safetensors' name: "F32", "BF16", "U8", "BOOL", ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        match = re.search(r"\d+", self.dtype)
        if match is None:  # BOOL: one byte
            return math.prod(self.shape)
        return math.prod(self.shape) * int(match[0]) // 8


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """`safetensors.safe_open` on the CPU, with errors that name the file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or truncated ({error}). {DAMAGED}") from error


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    with open_safetensors(path) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, not a dict
        entries = {key: TensorEntry(part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
        return entries, file.metadata() or {}


def write_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file; the same content is the same bytes (safetensors orders the metadata at random)."""
    check_utf8(path)
    save_file(tensors, path, metadata=metadata)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length  # the same text in another order
        file.seek(8)
        file.write(text.ljust(length))


def read_json(path: Path) -> dict[str, Any]:
    return parse_json(path.read_bytes(), path)


def parse_json(text: str | bytes, source: object) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not valid JSON ({error}). {DAMAGED}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{source}: contains {shown(content)}, not an object. {DAMAGED}")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json; empty if there is none. Raises as `read_json`."""
    path = file_in(folder, "config.json")
    if not path.is_file():
        return {}
    return read_json(path)


class WeightFolder:
    """The safetensors files of a model's folder: one file, or several with an index.

    FileNotFoundError or ValueError if a file is missing or truncated, or lacks a tensor that the index lists.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder.")
        self.entries: dict[str, TensorEntry] = {}  # key -> type and shape
        self.file_of: dict[str, Path] = {}  # key -> file
        file_names = file_names_in(file_in(self.folder, INDEX))
        if not file_names and not (self.folder / WEIGHTS).is_file():
            others = sorted(p.name for p in self.folder.glob("*.bin")) or sorted(p.name for p in self.folder.iterdir())
            raise FileNotFoundError(
                f"{self.folder}: has neither {WEIGHTS} nor {INDEX}, only {others[:5]}. Other formats cannot be read."
            )
        for name in sorted(set(file_names.values()) or {WEIGHTS}):
            path = file_in(self.folder, name)
            if not path.is_file():
                key = next(key for key, file in file_names.items() if file == name)
                raise FileNotFoundError(f"{path}: this shard is missing; {INDEX} says it holds {key!r}.")
            entries, _ = read_header(path)
            self.entries |= entries
            self.file_of |= dict.fromkeys(entries, path)
        for key, name in file_names.items():
            if self.file_of.get(key) != self.folder / name:
                raise ValueError(f"{self.folder / name}: has no tensor {key!r}, though {INDEX} says so.")

    def files(self) -> list[Path]:
        return sorted(set(self.file_of.values()))

    def is_packed(self, key: str) -> bool:
        """Whether a weight is stored in bitsandbytes' 4-bit format."""
        return f"{key}.absmax" in self.entries

    def tensors(self, keys: list[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for path in {self.file_of[key] for key in keys}:
            with open_safetensors(path) as file:
                tensors |= {key: file.get_tensor(key) for key in keys if self.file_of[key] == path}
        return tensors


def file_names_in(index: Path) -> dict[str, str]:
    """Key of a tensor -> the file of the same folder that holds it; empty if there is no such index."""
    if not index.is_file():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: its 'weight_map' is {shown(weight_map)}; it must be an object: key -> file name.")
    for key, name in weight_map.items():
        check_name(f"{index}: the file of {key!r}", name)
    return weight_map
