"""A lock between processes: a file that exists while a process has the lock."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def lock_file(path: Path, timeout: float) -> Iterator[bool | None]:
    """Lock a file, and delete it at the end; yields False if it is not free, None if the file system has no locks."""
    lock = FileLock(path)
    locked = None
    with suppress(NotImplementedError, OSError):  # no locks here: `locked` is still None
        try:
            lock.acquire(timeout=timeout)
            locked = True
        except Timeout:
            locked = False
    try:
        yield locked
    finally:
        if locked:
            with suppress(OSError):  # on Windows the release deletes it
                path.unlink()  # before the release: filelock >= 3.21 never returns a lock on a deleted file
        lock.release()
