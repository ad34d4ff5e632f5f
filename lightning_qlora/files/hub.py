"""Folders of others: which files they may name, by a text or a symbolic link; models by their names on the hub."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from lightning_qlora.checks import shown

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
CACHED_MODEL = "models--"  # what the folder of a model in a cache of the Hugging Face Hub begins with


def check_name(subject: str, name: Any) -> None:
    """Raise ValueError for what a file names as a file beside it, if it is no name, but a path on any system."""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]|^.:", name):
        raise ValueError(f"{subject} is {shown(name)}, which is not a file of this folder.")


def file_in(folder: Path, name: str) -> Path:
    """A file of a folder, which may not exist; ValueError if it links to a place outside of it, or is no file."""
    path = folder / name
    if path.is_symlink():
        inside = path.parent.resolve()
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(inside) and not _is_blob(target, inside):
            raise ValueError(
                f"{path}: is a symbolic link to {target}, outside of the folder. Put the file there (a hard link, "
                "cp -l, needs no space)."
            )
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path}: is a pipe, a socket or a device, which may have no end. Put a file there.")
    return path


def check_files(folder: Path, endings: tuple[str, ...] = ("",)) -> None:
    """The same for each file that has one of these endings."""
    for path in folder.iterdir():
        if path.name.endswith(endings):
            file_in(folder, path.name)


def copy_files(folder: Path, target: Path, without: tuple[str, ...]) -> None:
    """Copy the files of a folder, except names with these endings and those that begin with a dot, or are there.

    Their contents alone: with modes a set-user-id file of another user would become one of this user.
    """
    for path in folder.iterdir():
        is_other = path.name.startswith(".") or path.name.endswith(without) or (target / path.name).exists()
        if path.is_file() and not is_other:
            shutil.copyfile(file_in(folder, path.name), target / path.name)


def _is_blob(target: Path, folder: Path) -> bool:
    """Whether a file is a blob of the model whose snapshot a folder of a Hugging Face cache is, or is in."""
    for snapshot in (folder, *folder.parents):
        model = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and model.name.startswith(CACHED_MODEL):
            blobs = model.parent / "blobs"  # of all models of the cache (huggingface_hub/utils/_shared_blobs.py)
            is_hash = re.fullmatch("[0-9a-f]{64}", target.name) is not None
            return target.parent == model / "blobs" or (is_hash and target.parent == blobs / target.name[:2])
    return False


def resolve_model(name: str, download: bool = True) -> str:
    """Folder of a model: itself if it is a path, else the Hugging Face Hub's snapshot of that name.

    `download` is False for a name that was read from a file and that the user did not pass: then only the cache is
    searched. Raises FileNotFoundError if the name is neither, and ValueError for a file's name of another computer,
    to which Windows would send the user's credentials.
    """
    if not download and re.match(r"[\\/]{2}", name):
        raise ValueError(f"{name}: the file names this base model, on another computer. Pass the model: base_model=...")
    if os.path.exists(name):
        return name
    files = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(name, allow_patterns=files, local_files_only=not download)
    except (ImportError, OSError, ValueError) as error:
        if not download:
            remedy = "Pass the folder, where it is now: base_model=FOLDER (--base_model FOLDER)."
            if HUB_NAME.fullmatch(name):
                remedy += f" Or download it by its name: base_model={name!r} (--base_model {name})."
            raise FileNotFoundError(
                f"{name}: the file names this base model, and it is neither a folder (seen from {os.getcwd()}) nor in "
                f"the cache of the Hugging Face Hub. {remedy}"
            ) from error
        raise FileNotFoundError(
            f"{name}: neither a folder nor a model on the hub. Check the name, the connection, and that "
            "huggingface_hub is installed."
        ) from error
