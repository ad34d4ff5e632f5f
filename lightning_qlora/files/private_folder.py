"""Folders and files that no other user can change: the conditions of OpenSSH's StrictModes, for code that is loaded."""

import os
import stat
from pathlib import Path

OWN_FOLDER = "Set LIGHTNING_QLORA_CACHE to a folder that belongs to you and that only you can write to (chmod 700)."


def objection(path: Path) -> str | None:
    """Why another user could have written a file or folder, or could replace it; None if nobody could.

    Owner of it and of all folders above it must be this user or root. Others must not have the right to write, except
    in a folder with the sticky bit (as /tmp), where they can't replace what is not theirs. A group that has no other
    member, as Debian and Fedora give each user, may have the right.
    """
    if os.name != "posix":
        return None
    path = path.absolute()
    if path.is_symlink():
        return f"{path} is a symbolic link"
    for part in (path, *path.resolve().parents):
        found = part.stat()
        if found.st_uid not in (os.geteuid(), 0):
            return f"{part} belongs to another user (uid {found.st_uid})"
        sticky = part != path and found.st_mode & stat.S_ISVTX
        by_group = found.st_mode & stat.S_IWGRP and not _is_private_group(found.st_gid)
        if (by_group or found.st_mode & stat.S_IWOTH) and not sticky:
            return f"{part} can be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _is_private_group(gid: int) -> bool:
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:  # not in the files of this container
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def cache_folder() -> Path:
    """Where things are kept: $LIGHTNING_QLORA_CACHE, else `lightning_qlora` in the user's cache folder.

    It is created if it does not exist, for this user alone (mode 0700). Raises OSError if it cannot be created, another
    user could have written to it or could replace it, or the user has no home folder.
    """
    chosen, caches = os.environ.get("LIGHTNING_QLORA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(chosen or Path(caches or Path.home() / ".cache") / "lightning_qlora").absolute()  # for dlopen
        for part in reversed([part for part in (folder, *folder.parents) if not part.exists()]):
            part.mkdir(mode=0o700, exist_ok=True)
        if why := objection(folder.resolve()):
            raise PermissionError(f"{folder}: {why}")
    except (OSError, RuntimeError) as error:  # no home: the user is not in the password file, as in some containers
        raise OSError(f"{error}. {OWN_FOLDER}") from error
    return folder
