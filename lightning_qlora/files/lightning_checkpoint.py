"""Reads a Lightning checkpoint: one file, or a folder of shards, which FSDP2 writes."""

import io
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import torch

from lightning_qlora.checks import DAMAGED

META = "meta.pt"  # everything except weights and optimizer state, in a file beside the shards
SHARDS_INDEX = ".metadata"  # the shard of every tensor
OTHER_FILES = (  # of folders that are no checkpoints
    "adapter_config.json",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)
# All that torch.distributed.checkpoint writes into an index, except dtypes and the path of the folder.
INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


def is_shards(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder of a checkpoint in shards, and not of a model or an adapter with such a file."""
    return _has_file(path, (META, SHARDS_INDEX)) and not _has_file(path, OTHER_FILES)


def _has_file(folder: str | os.PathLike[str], names: tuple[str, ...]) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def read_checkpoint(path: str | os.PathLike[str], weights_only: bool = True) -> Any:
    """Read a checkpoint into host memory: a file is memory-mapped, the tensors of shards are put together.

    `weights_only` as in torch.load: run no code of the files, also not of the index of shards. Raises
    FileNotFoundError if there is no checkpoint, and ValueError if it is broken or weights_only refuses an object in it.
    """
    shards = is_shards(path)
    if not shards and not os.path.isfile(path):
        kind = "no such file"
        if _has_file(path, OTHER_FILES):
            kind = "a folder of a model or an adapter, not of a checkpoint"
        elif os.path.isdir(path):
            kind = f"no checkpoint (no {META} in it)"
        raise FileNotFoundError(f"{path}: {kind}.")
    with one_line_errors(path):
        if shards:
            return _read_shards(Path(path), weights_only)
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)


def _read_shards(folder: Path, weights_only: bool) -> dict[str, Any]:
    """Lightning's _load_distributed_checkpoint (lightning/fabric/utilities/load.py), with `weights_only`."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    class Reader(FileSystemReader):
        """Reads the index without running code in it; torch would unpickle it."""

        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return replace(index, storage_meta=replace(index.storage_meta or StorageMeta(), load_id=self.load_id))

    class Planner(_EmptyStateDictLoadPlanner):
        """Reads values that are no tensors without running code in them; torch would unpickle them."""

        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            plain = io.BytesIO()
            torch.save(torch.load(value, weights_only=weights_only), plain)  # without classes that torch.load refuses
            plain.seek(0)
            super().load_bytes(read_item, plain)

    state: dict[str, Any] = {}
    index = read_index(folder / SHARDS_INDEX, weights_only)
    try:
        _load_state_dict(state, storage_reader=Reader(folder), planner=Planner(), no_dist=True)  # type: ignore[no-untyped-call]
    except CheckpointException as error:  # a BaseException, whose text is a traceback
        raise next(iter(error.failures.values()))[0] from error
    state |= torch.load(folder / META, map_location="cpu", weights_only=weights_only, mmap=True)
    return state


def read_index(path: Path, weights_only: bool) -> Any:
    """The index of shards, torch's `Metadata`; weights_only=False runs code in its pickle.

    Raises UnpicklingError for a class that does not belong there, and ValueError for a shard outside of its folder.
    """
    with path.open("rb") as file:
        if weights_only:
            index = _IndexUnpickler(file).load()
        else:
            index = pickle.load(file)
    for place in index.storage_data.values():
        if Path(place.relative_path).name != place.relative_path or place.relative_path == "..":
            raise ValueError(f"{path}: names the shard {place.relative_path!r}, which is not a file of this folder.")
    return index


def keys_of_shards(path: str | os.PathLike[str], names: Iterable[str]) -> set[str]:
    with one_line_errors(path):
        index = read_index(Path(path) / SHARDS_INDEX, weights_only=True)
    keys = index.state_dict_metadata
    return {key.removeprefix(f"{name}.") for name in names for key in keys if key.startswith(f"{name}.")}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local"):  # a path of any system, from any Python
            return PurePath
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or name in INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} does not belong into an index of shards")


@contextmanager
def one_line_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of `torch.load` into ValueErrors of one line that name the file, and the object it refused."""
    try:
        yield
    except Exception as error:  # damaged bytes make torch and pickle raise errors of any type
        if isinstance(error, (ValueError, FileNotFoundError)) and os.fspath(path) in str(error):
            raise  # it names the file
        refused_class = re.search(r"GLOBAL (\S+) ", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused_class is not None:
            raise ValueError(
                f"{path}: holds a {refused_class[1]}, a hyperparameter for example. Loading it can run code of whoever "
                "wrote the file. If you trust them, pass weights_only=False (--weights_only false)."
            ) from error
        if isinstance(error, (AttributeError, ImportError)):
            raise ValueError(f"{path}: holds an object whose class cannot be imported ({error}).") from error
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: not a checkpoint, or truncated ({first_line}). {DAMAGED}") from error
