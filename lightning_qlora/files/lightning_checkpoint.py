"""Reads a Lightning checkpoint: one file, or a folder of shards, which FSDP2 writes."""

import io
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.checks import DAMAGED, shown
from lightning_qlora.files.hub import file_in
from lightning_qlora.texts import printable

META = "meta.pt"  # everything except weights and optimizer state, in a file beside the shards
SHARDS_INDEX = ".metadata"  # the shard of every tensor
OTHER_FILES = (  # of folders that are no checkpoints
    "adapter_config.json",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
)


def is_shards(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder of a checkpoint in shards, and not of a model or an adapter with such a file."""
    return _has_file(path, (META, SHARDS_INDEX)) and not _has_file(path, OTHER_FILES)


def check_dense(key: str, value: Any) -> None:
    """Raise ValueError if a value of a file is no tensor that stores each of its values.

    A copy of an expanded tensor has another size than the file, and the bytes of a quantized one are not its values.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{key}: is {shown(value)}, and must be a tensor. {DAMAGED}")
    dense = value.layout is torch.strided and not value.is_quantized and not value.is_meta
    if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{key}: is a quantized, sparse or expanded tensor, or has no values. {DAMAGED}")


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
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    class Zeros(_EmptyStateDictLoadPlanner):
        """Begins with zeros: what no shard has would be what was in memory before."""

        def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
            super().set_up_planner(*args, **kwargs)
            for value in self.state_dict.values():
                if isinstance(value, Tensor):
                    value.zero_()

    state: dict[str, Any] = {}
    reader, planner = _reader_and_planner(folder, weights_only, Zeros)
    with _errors_of_values():
        _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
    state |= torch.load(file_in(folder, META), map_location="cpu", weights_only=weights_only, mmap=True)
    return state


def _reader_and_planner(folder: Path, weights_only: bool, kind: Any) -> tuple[Any, Any]:
    """What reads shards in torch, without running code in them; torch unpickles the index, and what is no tensor."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    from lightning_qlora.files.shards_index import read_index

    index = read_index(file_in(folder, SHARDS_INDEX), weights_only)

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return replace(index, storage_meta=StorageMeta(load_id=self.load_id))

    class Planner(kind):  # type: ignore[misc]
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            plain = io.BytesIO()
            torch.save(torch.load(value, weights_only=weights_only), plain)  # without classes that torch.load refuses
            plain.seek(0)
            super().load_bytes(read_item, plain)

    return Reader(folder), Planner()


@contextmanager
def _errors_of_values() -> Iterator[None]:
    """Raise the error of the first rank in place of torch's CheckpointException, a BaseException with a traceback."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


@contextmanager
def one_line_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of `torch.load` into ValueErrors of one line that name the file, and the object it refused."""
    try:
        yield
    except Exception as error:  # damaged bytes make torch and pickle raise errors of any type
        if isinstance(error, (ValueError, FileNotFoundError)) and os.fspath(path) in str(error):
            raise  # it names the file
        raise ValueError(in_one_line(path, error)) from error


def _is_archive(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def in_one_line(path: object, error: Exception) -> str:
    refused_class = re.search(r"GLOBAL (\S+) ", str(error))
    if isinstance(error, pickle.UnpicklingError) and refused_class is not None:
        text = (
            f"holds a {refused_class[1]}, a hyperparameter for example. Loading it can run code of whoever wrote the "
            "file. If you trust them, pass weights_only=False (--weights_only false), or where Lightning has no such "
            "argument set the environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1."
        )
    elif isinstance(error, (AttributeError, ImportError)):
        text = f"holds an object whose class cannot be imported ({error})."
    elif isinstance(path, (str, Path)) and os.path.isfile(path) and not _is_archive(path):
        text = "not a checkpoint, or truncated: torch.save writes archives. Pass what the training wrote (.ckpt)."
    else:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        text = f"not a checkpoint, or truncated ({first_line}). {DAMAGED}"
    return f"{path}: {printable(text)}"
