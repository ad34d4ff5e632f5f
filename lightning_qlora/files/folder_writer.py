"""Folders that are complete or absent: written under a temporary name, which is then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

INCOMPLETE = ".lightning_qlora-incomplete-"  # prefix of folders that are being written; a killed process leaves one


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write to. It is renamed to `target` when the block ends, and deleted if the block raises.

    FileExistsError if `target` is not an empty folder, or can't be replaced. OSError if it can't be written.
    """
    check_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(target.parent, target) as partial:
        yield partial
        with suppress(FileNotFoundError):
            target.rmdir()  # it is empty, and Windows does not rename to a name that exists
        partial.rename(target)


@contextmanager
def atomic_files(target: Path) -> Iterator[Path]:
    """Yield a folder to write files to. Each file replaces the file of that name in `target` when the block ends.

    A JSON file that changes is removed first and written last: a process that is killed
    in between leaves a folder without it, which readers refuse, and never files of two adapters. OSError if the files
    can't be written.
    """
    existed = target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with _temporary_folder(target, target) as partial:
            yield partial
            for path in partial.glob("*.json"):
                previous = target / path.name
                if previous.is_file() and previous.read_bytes() != path.read_bytes():
                    previous.unlink()
            for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".json"):  # weights, then config
                path.replace(target / path.name)
    except BaseException:
        if not existed:
            with suppress(OSError):  # not empty
                target.rmdir()
        raise


def check_free(target: Path) -> None:
    """FileExistsError for a target that exists, but for an empty folder; ValueError for a name that is not UTF-8."""
    check_utf8(target)
    if target.is_symlink():
        reason = f"is a symbolic link to {os.path.realpath(target)}"
    elif not target.exists():
        return
    elif not target.is_dir() or any(target.iterdir()):
        reason = "exists and is not an empty folder"
    elif target.samefile(Path.cwd()) or os.path.ismount(target):
        reason = "is the current directory or a mount point"
    else:
        return
    raise FileExistsError(f"{target}: {reason}, and can't be replaced by a new folder. Choose another name.")


def check_utf8(path: Path) -> None:
    """Raise ValueError for a path whose bytes are not UTF-8, whatever the locale makes of them."""
    name = os.fsencode(path)
    try:
        name.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name!r}: the name is not UTF-8 ({error}), and safetensors reads no other. Choose another name."
        ) from error


@contextmanager
def _temporary_folder(parent: Path, target: Path) -> Iterator[Path]:
    """A new folder in `parent`, deleted at the end; `target` is named in errors that name no file (a full disk)."""
    folder = parent / f"{INCOMPLETE}{uuid4().hex}"  # only the owner can read a folder of `tempfile`
    try:
        folder.mkdir()
        yield folder
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
            raise
        raise OSError(f"{target}: could not be written ({error}).") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
