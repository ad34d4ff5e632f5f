"""The cache folder, which no other user can write to, and a lock between the processes that use it.

It holds code that is loaded, so the conditions are those of OpenSSH's StrictModes.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

OWN_FOLDER = "Set LIGHTNING_QLORA_CACHE to a folder that belongs to you and that only you can write to (chmod 700)."


def objection(path: Path) -> str | None:
    """Why another user could have written a file or folder, or could replace it; None if nobody could.

    In a folder with the sticky bit (as /tmp) others can write, but can't replace files of this user. A group without
    other members, as Debian and Fedora give each user, may write.
    """
    if os.name != "posix":
        return None
    path = path.absolute()
    if path.is_symlink():
        return f"{path} is a symbolic link"
    for part in (path, *path.resolve().parents):
        status = part.stat()
        if status.st_uid not in (os.geteuid(), 0):
            return f"{part} belongs to another user (uid {status.st_uid})"
        if part != path and status.st_mode & stat.S_ISVTX:
            continue
        by_group = status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid)
        if by_group or status.st_mode & stat.S_IWOTH:
            return f"{part} can be written by other users (mode {stat.S_IMODE(status.st_mode):o})"
    return None


def _is_private_group(gid: int) -> bool:
    import grp
    import pwd

    try:
        user = pwd.getpwuid(os.geteuid())
        group = grp.getgrgid(gid)
    except KeyError:  # not in the files of this container
        return False
    if gid != user.pw_gid or group.gr_name != user.pw_name or not set(group.gr_mem) <= {user.pw_name}:
        return False
    return all(other.pw_uid == user.pw_uid for other in pwd.getpwall() if other.pw_gid == gid)


def cache_folder() -> Path:
    """The cache folder: $LIGHTNING_QLORA_CACHE, else `lightning_qlora` in the user's cache folder.

    It is created for this user alone (mode 0700). Raises OSError if that is not possible, if there is an `objection`,
    if the user has no home folder, or if the path is relative: it would be in a folder that others may have packed.
    """
    try:
        folder = _named_folder()
        if not folder.is_absolute():
            raise PermissionError(f"{folder}: is a relative path")
        for part in reversed([part for part in (folder, *folder.parents) if not part.exists()]):
            part.mkdir(mode=0o700, exist_ok=True)
        reason = objection(folder.resolve())
        if reason is not None:
            raise PermissionError(f"{folder}: {reason}")
    except (OSError, RuntimeError) as error:  # no home: the user is not in the password file, as in some containers
        raise OSError(f"{str(error).removesuffix('.')}. {OWN_FOLDER}") from error
    return folder


def _named_folder() -> Path:
    if os.environ.get("LIGHTNING_QLORA_CACHE"):
        return Path(os.environ["LIGHTNING_QLORA_CACHE"])
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():  # to be ignored, says its specification
        caches = Path.home() / ".cache"
    return caches / "lightning_qlora"


@contextmanager
def lock_file(path: Path, timeout: float) -> Iterator[None]:
    """Lock a file, and delete it at the end; after `timeout` seconds, or where files have no locks, go on without."""
    lock = FileLock(path)
    with suppress(NotImplementedError, OSError):  # its Timeout is an OSError
        lock.acquire(timeout=timeout)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # on Windows the release deletes it
                path.unlink()  # before the release: filelock >= 3.21 never returns a lock on a deleted file
        lock.release()
