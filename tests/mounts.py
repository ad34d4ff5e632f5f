"""A file system of its own for a test: a full disk, a folder without execution. Linux lets root mount one."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def mounted(folder, options):
    """Mount a new file system in memory at a new folder; skips the test where that is not allowed."""
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no command `mount`")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
