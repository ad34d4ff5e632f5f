"""Reading a Lightning checkpoint: one file, or the folder of shards that is written under FSDP2."""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

META = "meta.pt"  # what is not weights or optimizer state, beside the shards
INDEX = ".metadata"  # what is in which shard


def is_shards(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a checkpoint in shards."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (META, INDEX))


def read_checkpoint(path: str | os.PathLike[str], weights_only: bool = True) -> Any:
    """What a checkpoint holds, in host memory: of one file memory-mapped, of shards put together.

    Args:
        path: The file, or the folder of shards.
        weights_only: As in `torch.load`: whether to refuse what is neither a tensor nor a plain value. The index
            of shards is a pickle all the same, as torch.distributed.checkpoint writes and reads it: load only shards of
            whom you trust.

    Raises:
        FileNotFoundError, ValueError: If there is none, it is broken, or holds what weights_only refuses.
    """
    if is_shards(path):
        with errors_in_one_line(path):
            return _read_shards(Path(path), weights_only)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path}: no {'checkpoint (no ' + META + ' in it)' if os.path.isdir(path) else 'file'}."
        )
    with errors_in_one_line(path):
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)


def _read_shards(folder: Path, weights_only: bool) -> dict[str, Any]:
    """As lightning/fabric/utilities/load.py, _load_distributed_checkpoint, which knows no `weights_only`."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    for name in (INDEX, META):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: a checkpoint in shards that lacks its file {name}.")
    state: dict[str, Any] = {}
    reader, planner = FileSystemReader(folder), _EmptyStateDictLoadPlanner()  # type: ignore[no-untyped-call]
    try:
        _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:  # no Exception, and its text is a traceback
        cause = next(iter(error.failures.values()))[0]
        line = next(iter(str(cause).splitlines()), "")
        raise ValueError(f"{folder}: a shard is missing or broken ({type(cause).__name__}: {line}).") from cause
    return {**state, **torch.load(folder / META, map_location="cpu", weights_only=weights_only, mmap=True)}


@contextmanager
def errors_in_one_line(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within this, `torch.load` of a checkpoint that is broken, or holds other things than weights, says so in a line.

    Raises:
        ValueError: As above; names the file and the object.
    """
    try:
        yield
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a checkpoint, or truncated ({str(error).splitlines()[0]}).") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+) ", str(error))
        if found is None:
            raise ValueError(f"{path}: not a checkpoint, or truncated.") from error
        raise ValueError(
            f"{path}: holds a {found[1]}, a hyperparameter perhaps, which is no weight: reading it can run code of "
            "whoever wrote the file. If you trust them, pass weights_only=False (--weights_only false)."
        ) from error
    except (AttributeError, ImportError) as error:
        raise ValueError(f"{path}: holds an object whose class is not to be found here ({error}).") from error
