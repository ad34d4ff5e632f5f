"""Reads a Lightning checkpoint: one file, or a folder of shards, which FSDP2 writes."""

import io
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import torch

from lightning_qlora.files.regular_file import is_file

META = "meta.pt"  # everything except weights and optimizer state, in a file beside the shards
SHARDS_INDEX = ".metadata"  # the shard of every tensor
OTHER = ("adapter_config.json", "config.json", "model.safetensors", "model.safetensors.index.json")
# All that torch.distributed.checkpoint writes into an index, except dtypes.
INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}  # fmt: skip


def is_shards(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder of a checkpoint in shards, and not of a model or an adapter with such a file."""
    return _has_file(path, (META, SHARDS_INDEX)) and not _has_file(path, OTHER)


def _has_file(folder: str | os.PathLike[str], names: tuple[str, ...]) -> bool:
    return any(os.path.isfile(os.path.join(folder, name)) for name in names)


def read_checkpoint(
    path: str | os.PathLike[str], weights_only: bool = True, keys: Collection[str] | None = None
) -> Any:
    """Read a checkpoint into host memory: a file is memory-mapped, the tensors of shards are put together.

    `weights_only` is torch.load's: refuse objects that are neither tensors nor plain values, and run no code of the
    files, the index of shards included. `keys`: of shards, to read no others. Raises FileNotFoundError if there is no
    checkpoint, and ValueError if it is broken, or contains objects that weights_only refuses.
    """
    shards, folder = is_shards(path), os.path.isdir(path)
    if not shards and (folder or not is_file(path)):
        kind = f"no checkpoint (no {META} in it)" if folder else "no such file"
        if _has_file(path, OTHER):
            kind = "a folder of a model or an adapter, not of a checkpoint"
        raise FileNotFoundError(f"{path}: {kind}.")
    check_crc(path, weights_only)
    with one_line_errors(path):
        if shards:
            return _read_shards(Path(path), weights_only, keys)
        in_utf8 = os.fsencode(path) == str(path).encode("utf-8", "replace")  # torch maps no file of another name
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=in_utf8)


def check_crc(path: str | os.PathLike[str], weights_only: bool | None = True) -> None:
    """Compare a checkpoint with the CRC-32 that `torch.save` writes of each part of a file; torch.load does not.

    In shards each value is saved this way, at its offset in the index. Does nothing for other files, and for addresses.
    Raises ValueError if a part is damaged, with its name.
    """
    if is_shards(path):
        with one_line_errors(path):
            _check_shards(Path(path), weights_only)
    elif not os.path.isdir(path) and is_file(path):
        with open(path, "rb") as file:
            if file.read(2) == b"PK":  # a zip file
                _check_archive(file, path)


def _check_archive(file: Any, name: str | os.PathLike[str]) -> None:
    """Compare what `torch.save` wrote into a file with its CRC-32."""
    try:
        with zipfile.ZipFile(file) as archive:
            has_crc = any(part.CRC for part in archive.infolist())  # torch.serialization.set_crc32_options(False)
            damaged = archive.testzip() if has_crc else None
    except Exception as error:  # damaged bytes make zipfile raise errors of any type
        raise ValueError(f"{name}: damaged or truncated ({error}). Use another copy of it.") from error
    if damaged is not None:
        raise ValueError(f"{name}: its part {damaged!r} is damaged (CRC-32). Use another copy of it.")


def _check_shards(folder: Path, weights_only: bool | None) -> None:
    """Compare every value in shards with its CRC-32, and the index, which has none, with what the shards contain."""
    check_crc(folder / META)
    if not is_file(folder / SHARDS_INDEX):
        return  # reading names it
    index = read_index(folder / SHARDS_INDEX, weights_only)

    def require(fits: bool, name: str) -> None:
        if not fits:
            raise ValueError(
                f"{folder / SHARDS_INDEX}: {name!r} is not what the shards contain. Use another copy of it."
            )

    parts: dict[tuple[str, Any], int] = {}  # name, and first element in the whole tensor -> bytes
    for name, entry in index.state_dict_metadata.items():
        require(".".join(map(str, (index.planner_data or {}).get(name, ()))) == name, name)  # keys of nested dicts
        chunks = getattr(entry, "chunks", None)
        if chunks is None:
            parts[name, None] = 0  # no tensor
            continue
        require(sum(chunk.sizes.numel() for chunk in chunks) == entry.size.numel(), name)
        itemsize = entry.properties.dtype.itemsize
        parts |= {(name, chunk.offsets): chunk.sizes.numel() * itemsize for chunk in chunks}
    require(parts.keys() == {(place.fqn, place.offset) for place in index.storage_data}, "a value")
    ends: dict[str, int] = {}
    shards = {info.relative_path for info in index.storage_data.values()}
    if missing := sorted(name for name in shards if not is_file(folder / name)):
        raise ValueError(f"{folder}: its shard {missing[0]} is missing. Use another copy of the checkpoint.")
    for place, info in sorted(index.storage_data.items(), key=lambda pair: pair[1].offset):
        # One value begins where the one before ends, so none is there twice, and none is missing.
        require(info.offset == ends.get(info.relative_path, 0), place.fqn)
        ends[info.relative_path] = info.offset + info.length
        if not info.transform_descriptors:  # a compressed value has no CRC-32
            require(parts[place.fqn, place.offset] <= info.length, place.fqn)
            with (folder / info.relative_path).open("rb") as shard:
                shard.seek(info.offset)
                _check_archive(io.BytesIO(shard.read(info.length)), f"{folder / info.relative_path}: {place.fqn!r}")
    for name, end in ends.items():
        require((folder / name).stat().st_size == end, name)


def _read_shards(folder: Path, weights_only: bool, keys: Collection[str] | None) -> dict[str, Any]:
    """Lightning's _load_distributed_checkpoint (lightning/fabric/utilities/load.py), with `weights_only`."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    class Reader(FileSystemReader):
        """Without code of the index, which torch unpickles."""

        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return replace(index, storage_meta=replace(index.storage_meta or StorageMeta(), load_id=self.load_id))

    class Planner(_EmptyStateDictLoadPlanner):
        """Without code of the values that are no tensors, which torch unpickles."""

        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            plain, found = io.BytesIO(), torch.load(value, weights_only=weights_only)
            torch.save(found, plain)  # now without classes that torch.load refuses
            plain.seek(0)
            super().load_bytes(read_item, plain)

    for name in (SHARDS_INDEX, META):
        if not is_file(folder / name):
            raise FileNotFoundError(f"{folder}: a checkpoint in shards that lacks its file {name}.")
    state: dict[str, Any] = {}
    index = read_index(folder / SHARDS_INDEX, weights_only)
    try:
        _load_state_dict(state, storage_reader=Reader(folder), planner=Planner(keys), no_dist=True)  # type: ignore[no-untyped-call]
    except CheckpointException as error:  # a BaseException; its text is a traceback
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, pickle.UnpicklingError):
            raise cause from None
        line = next(iter(str(cause).splitlines()), "")
        raise ValueError(f"{folder}: a shard is missing or broken ({type(cause).__name__}: {line}).") from cause
    state |= torch.load(folder / META, map_location="cpu", weights_only=weights_only, mmap=True)
    if "pytorch-lightning_version" in state:  # of a Trainer: the names that it has in one file
        numbered = list(takewhile(state.__contains__, (f"optimizer_{number}" for number in count())))
        if numbered:
            state["optimizer_states"] = [state.pop(name) for name in numbered]
    return state


def names_in_shards(folder: str | os.PathLike[str], weights_only: bool | None = True) -> Collection[str]:
    """Names of the values in the shards of a folder."""
    with one_line_errors(folder):
        names: Collection[str] = read_index(Path(folder) / SHARDS_INDEX, weights_only).state_dict_metadata
    return names


def read_index(path: Path, weights_only: bool | None = True) -> Any:
    """The index of shards (torch.distributed.checkpoint.metadata.Metadata); weights_only=False runs code in its pickle.

    Raises UnpicklingError for anything but what torch.distributed.checkpoint writes into an index, and ValueError for
    a shard outside of its folder.
    """
    try:
        with path.open("rb") as file:
            index = (_Unpickler if weights_only is False else _IndexUnpickler)(file).load()
        shards = {place.relative_path for place in index.storage_data.values()}
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged bytes make an unpickler raise errors of any type
        raise pickle.UnpicklingError(str(error)) from error
    for shard in shards:
        if not isinstance(shard, str) or shard in ("", "..") or Path(shard).name != shard:
            raise ValueError(f"{path}: names the shard {shard!r}, which is not a file of this folder.")
    return index


# Python's unpickler: the one in C can allocate 32 GB for its list of known objects if one bit is damaged.
_Unpickler: Any = pickle._Unpickler


class _IndexUnpickler(_Unpickler):  # type: ignore[misc]
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or name in INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} does not belong into an index of shards")


@contextmanager
def one_line_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of `torch.load` into ValueErrors of one line that name the file, and the object it refused."""
    try:
        yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+) ", str(error))
        if found is None:
            raise ValueError(f"{path}: not a checkpoint, or truncated. Use another copy of it.") from error
        raise ValueError(
            f"{path}: holds a {found[1]}, a hyperparameter for example. Loading it can run code of whoever wrote the "
            "file. If you trust them, pass weights_only=False (--weights_only false)."
        ) from error
    except (AttributeError, ImportError) as error:
        raise ValueError(f"{path}: holds an object whose class cannot be imported ({error}).") from error
    except Exception as error:  # damaged bytes make torch and the unpickler raise errors of any type
        if isinstance(error, (ValueError, FileNotFoundError)) and os.fspath(path) in str(error):
            raise  # one of ours
        why = f" ({next(iter(str(error).splitlines()), type(error).__name__)})" if zipfile.is_zipfile(path) else ""
        raise ValueError(f"{path}: not a checkpoint, or truncated{why}. Use another copy of it.") from error
