"""Whether a path is a file that can be read to its end: a pipe or a device would block, or never end."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file; all files are checked here before they are opened.

    Raises ValueError if there is something else at the path: a folder, a pipe, a socket, a device, a loop of links, or
    a file of 0 bytes, as those of /proc, which can be without end.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: can't be read ({getattr(error, 'strerror', error)}).") from error
    if not stat.S_ISREG(found.st_mode):
        kind = {"d": "folder", "p": "pipe", "s": "socket"}.get(stat.filemode(found.st_mode)[0], "device")
        raise ValueError(f"{path}: is a {kind}, not a file. Put a copy of the file there.")
    if not found.st_size:
        raise ValueError(f"{path}: is empty (0 bytes): truncated, or a file of /proc. Use another copy of it.")
    return True


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Check a file (`is_file`; FileNotFoundError if there is none), and let errors of reading it name it (OSError)."""
    if not is_file(path):
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        yield
    except (OSError, MemoryError) as error:
        if getattr(error, "filename", None) is not None:
            raise
        raise OSError(f"{path}: could not be read ({error or type(error).__name__}).") from error
