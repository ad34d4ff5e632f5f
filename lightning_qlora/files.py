"""Reading folders of safetensors, with errors that name the file and the key."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorEntry:
    """What the header of a safetensors file says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries and metadata of a safetensors file, with the check that all data is there.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file, or ends before a tensor does; names that tensor.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, size)))
            metadata = header.pop("__metadata__", {})
            entries = {
                key: (TensorEntry(value["dtype"], tuple(value["shape"]), end - begin), end)
                for key, value in header.items()
                for begin, end in [value["data_offsets"]]
            }
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: not a safetensors file, or its header is cut off ({size} bytes).") from error
    for key, (_, end) in sorted(entries.items(), key=lambda item: item[1][1]):
        if 8 + length + end > size:
            raise ValueError(
                f"{path}: truncated: {key!r} ends at byte {8 + length + end}, the file at {size}. Copy or download it "
                "again."
            )
    return {key: entry for key, (entry, _) in entries.items()}, metadata


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError, ValueError: If there is no such file, or no JSON object in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, not an object.")
    return content


class WeightFolder:
    """The safetensors of a model's folder, in one file or in shards with an index, checked when opened.

    Attributes:
        entries: Key -> what its header says.
        file_of: Key -> the file it is in.

    Raises:
        FileNotFoundError: If there is no safetensors file, or the index names one that is missing.
        ValueError: If a file is truncated, or lacks a tensor that the index promises.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder}: no such folder.")
        self.entries: dict[str, TensorEntry] = {}
        self.file_of: dict[str, Path] = {}
        index = self.folder / INDEX
        promised = _promised(index)
        if not promised and not (self.folder / WEIGHTS).is_file():
            others = sorted(p.name for p in self.folder.glob("*.bin")) or sorted(p.name for p in self.folder.iterdir())
            raise FileNotFoundError(
                f"{self.folder}: has neither {WEIGHTS} nor {INDEX}, but {others[:5]}. Only safetensors are read."
            )
        for name in sorted(set(promised.values()) or {WEIGHTS}):
            path = self.folder / name
            if not path.is_file():
                key = next(key for key, file in promised.items() if file == name)
                raise FileNotFoundError(f"{path}: this shard is missing; {INDEX} says it holds {key!r}.")
            entries, _ = read_header(path)
            self.entries |= entries
            self.file_of |= dict.fromkeys(entries, path)
        for key, name in promised.items():
            if self.file_of.get(key) != self.folder / name:
                raise ValueError(f"{self.folder / name}: has no tensor {key!r}, though {INDEX} says so.")

    def files(self) -> list[Path]:
        """The files, in order."""
        return sorted(set(self.file_of.values()))

    def find(self, name: str) -> str | None:
        """The key of a parameter; the files of a model with or without a head differ in the first part."""
        longer = [key for key in self.entries if key.endswith("." + name)]
        while name and name not in self.entries:
            name = name.partition(".")[2]
        return name or (longer[0] if len(longer) == 1 else None)

    def is_packed(self, key: str) -> bool:
        """Whether a weight is in bitsandbytes' 4 bits."""
        return f"{key}.absmax" in self.entries

    def tensors(self, keys: list[str]) -> dict[str, Tensor]:
        """Some tensors, on the CPU."""
        found: dict[str, Tensor] = {}
        for path in {self.file_of[key] for key in keys}:
            with open_safetensors(path) as file:
                found |= {key: file.get_tensor(key) for key in keys if self.file_of[key] == path}
        return found


def _promised(index: Path) -> dict[str, str]:
    """The index's keys and the files they are in; empty if there is no index."""
    if not index.is_file():
        return {}
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        what = "has no 'weight_map'" if found is None else f"its 'weight_map' is {str(found)[:80]!r}"
        raise ValueError(f"{index}: {what}; it must be an object of keys and the files they are in.")
    for key, name in found.items():
        if not isinstance(name, str):
            raise ValueError(f"{index}: {key!r} is said to be in {name!r}; it must be the name of a file.")
    return found


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """`safetensors.safe_open` whose errors name the file."""
    read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error


def resolve_model(name: str) -> str:
    """A model's folder: the name itself if it is one, else the hub's snapshot of that name.

    Raises:
        FileNotFoundError: If it is neither.
    """
    if os.path.isdir(name):
        return name
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise FileNotFoundError(f"{name}: no such folder, and huggingface_hub is not installed.") from error
    try:
        return snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{name}: neither a folder nor a model on the hub ({type(error).__name__}).") from error
