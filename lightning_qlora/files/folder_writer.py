"""Folders that are written completely or not at all, by any number of processes at once."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from lightning_qlora.files.file_lock import LOCK_TIMEOUT, lock_file

INCOMPLETE = ".lightning_qlora-incomplete-"  # of the folders that are being written
LOCK = ".lightning_qlora.lock"  # held while files are renamed into a folder


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a folder to write to. It is renamed to `target` when the block ends, and deleted if the block raises.

    If several processes write the same target, the first one to finish succeeds and the others raise FileExistsError,
    which is also raised if `target` is not an empty folder, or cannot be replaced. OSError: it cannot be written. What
    a killed process left is deleted by the next writer.
    """
    check_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _new_folder(target.parent, target) as partial:
        yield partial
        _flush(*partial.rglob("*"), partial)
        try:
            if os.name == "nt" and target.is_dir():  # elsewhere a rename replaces an empty folder
                target.rmdir()
            partial.rename(target)
        except OSError:
            check_free(target)  # another process may have finished first
            raise
        _flush(target.parent)


@contextmanager
def atomic_files(target: Path) -> Iterator[Path]:
    """Yield a folder to write files to. Each file replaces the file of that name in `target` when the block ends.

    Other files in `target` stay. Each file is renamed, so a reader sees the old one or the new one. A JSON file with
    other content is removed before the others are replaced and is written last: a process that is killed in between
    leaves a folder without it, which readers refuse, and never files of two writers. If several processes write the
    same target, all files of the last one to finish remain. Raises TimeoutError, and changes nothing, if another
    process does not finish its renames, and OSError if the files cannot be written.
    """
    existed = target.is_dir()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with _new_folder(target, target) as partial:
            yield partial
            _flush(*partial.iterdir())
            with lock_file(target / LOCK, LOCK_TIMEOUT) as locked:
                if locked is False:
                    raise TimeoutError(
                        f"{target}: another process has been replacing its files for {LOCK_TIMEOUT:g} s. Save again "
                        "when it has ended, or into another folder."
                    )
                _replace_files(partial, target)
    except BaseException:
        if not existed:
            with suppress(OSError):  # not empty: it has the files of another process
                target.rmdir()
        raise


def _replace_files(source: Path, target: Path) -> None:
    """Move the files of a folder into another one, as `atomic_files` describes."""
    for path in source.glob("*.json"):
        old = target / path.name
        if old.is_file() and (old.stat().st_size != path.stat().st_size or old.read_bytes() != path.read_bytes()):
            old.unlink()
    _flush(target)
    for path in sorted(source.iterdir(), key=lambda path: path.suffix == ".json"):  # weights, then config
        path.replace(target / path.name)
    _flush(target)


def check_free(target: Path) -> None:
    """Raise FileExistsError unless `target` does not exist or is an empty folder that can be replaced."""
    why = None
    if target.is_symlink():
        why = f"is a symbolic link to {os.path.realpath(target)}"
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        why = "exists and is not an empty folder"
    elif target.exists() and (target.samefile(Path.cwd()) or os.path.ismount(target)):
        why = "is the current directory or a mount point"
    if why:
        raise FileExistsError(f"{target}: {why}, and can't be replaced by a new folder. Choose another name.")


@contextmanager
def _new_folder(parent: Path, target: Path) -> Iterator[Path]:
    """A new folder in `parent`, deleted at the end; `target` is named in errors that name no file (a full disk).

    A locked file beside it shows that its process is alive. That file exists before the folder, so whatever a killed
    process leaves can be found and deleted.
    """
    for lock in parent.glob(f"{INCOMPLETE}{'[0-9a-f]' * 32}.lock"):
        with lock_file(lock, timeout=0) as locked:
            if locked:  # its process was killed
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    folder = parent / f"{INCOMPLETE}{uuid4().hex}"  # not of `tempfile`: only its owner could read it
    with lock_file(folder.with_suffix(".lock")):
        try:
            folder.mkdir()
            yield folder
        except (OSError, SafetensorError) as error:
            if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
                raise
            raise OSError(f"{target}: could not be written ({error}).") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _flush(*paths: Path) -> None:
    """Write files, and the entries of folders, to the disk, so that a rename cannot reach it before them."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # some file systems cannot do it for folders
                raise
        finally:
            os.close(descriptor)
