"""Folders written whole or not at all, by however many processes at once."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_qlora.files import INDEX, WEIGHTS

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SHARD_BYTES = 2_000_000_000  # of a folder we write: what is held in memory at once


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write to that becomes `target` when the block ends without an error, and is gone if it doesn't.

    Each writer has a folder of its own beside the target; of several, the first to end is the target and the others
    are refused. What a killed process left behind is removed by the next run.

    Raises:
        FileExistsError: If `target` exists and is not an empty folder, or can't be replaced.
        OSError: If it can't be written.
    """
    check_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _own_folder(target.parent, f".{target.name}.incomplete") as partial, _named(target):
        yield partial
        try:
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
        except OSError:
            check_free(target)  # another writer may have been faster
            raise


@contextmanager
def replaced_files(target: Path) -> Iterator[Path]:
    """A folder to write files to, each of which replaces the one of its name in `target` when the block ends.

    Other files in `target` stay. Each file is renamed into place, so a reader sees the old one or the new one; of
    several writers, the last to end leaves all of its files.
    """
    existed = target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with _own_folder(target, ".incomplete") as partial, _named(target):
            yield partial
            with _locked(target):
                # Weights first, their config last.
                for path in sorted(partial.iterdir(), key=lambda p: p.suffix == ".json"):
                    path.replace(target / path.name)
    except BaseException:
        if not existed:
            with suppress(OSError):  # another writer's files are in it
                target.rmdir()
        raise


def check_free(target: Path) -> None:
    """Raise FileExistsError unless `target` is absent, or an empty folder that another can take the place of."""
    if target.is_symlink():
        raise FileExistsError(
            f"{target}: is a symbolic link, and a new folder can't take its place. Pass the folder it points to "
            f"({os.path.realpath(target)}), or another name."
        )
    if not target.exists():
        return
    if not target.is_dir() or any(target.iterdir()):
        raise FileExistsError(f"{target}: exists and is not an empty folder. Choose another name, or remove it first.")
    if target.samefile(Path.cwd()) or os.path.ismount(target):
        what = "a mount point" if os.path.ismount(target) else "the folder this runs in"
        raise FileExistsError(f"{target}: is {what}, and a new folder can't take its place. Name a folder inside it.")


class ShardWriter:
    """Writes a model's safetensors into a folder, holding no more than one shard in memory."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[dict[str, int]] = []  # key -> bytes
        self.held: dict[str, Tensor] = {}

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor; write a shard when it would grow too large."""
        held = sum(value.nbytes for value in self.held.values())
        if self.held and held + tensor.nbytes > self.shard_bytes:
            self._write()
        self.held[key] = tensor.contiguous()

    def _write(self) -> None:
        self.shards.append({key: tensor.nbytes for key, tensor in self.held.items()})
        save_file(self.held, self._name(len(self.shards)), metadata={"format": "pt"})
        self.held = {}

    def _name(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"

    def finish(self) -> None:
        """Write what is left; name the files, and write their index, as transformers does."""
        self._write()
        count = len(self.shards)
        if count == 1:
            self._name(1).rename(self.folder / WEIGHTS)
            return
        file_of: dict[str, str] = {}
        for number, shard in enumerate(self.shards, 1):
            name = f"model-{number:05}-of-{count:05}.safetensors"
            self._name(number).rename(self.folder / name)
            file_of |= dict.fromkeys(shard, name)
        index = {"metadata": {"total_size": sum(sum(s.values()) for s in self.shards)}, "weight_map": file_of}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """Errors of safetensors' writer (a full disk, say) name what was to be written."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{target}: could not be written ({error}).") from error


@contextmanager
def _own_folder(parent: Path, start: str) -> Iterator[Path]:
    """A new folder in `parent` whose name begins with `start`; locked while it is ours, and gone afterwards."""
    _remove_abandoned(parent, start)
    word = uuid4().hex[:12]
    fresh, folder = parent / f".new-{word}", parent / f"{start}-{word}"
    fresh.mkdir()
    lock = _lock(fresh)
    fresh.rename(folder)  # only now can others find it: a folder that is not locked counts as abandoned
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_abandoned(parent: Path, start: str) -> None:
    """Remove the folders of killed processes: those that nobody holds a lock on."""
    for folder in [path for path in parent.iterdir() if path.name.startswith(start)]:
        with suppress(OSError):  # gone already
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is within this for the same folder; without locks, don't."""
    lock = _lock(folder, wait=True)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, wait: bool = False) -> int | None:
    """A descriptor that locks a folder until it is closed or the process ends; None if that is not to be had."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
