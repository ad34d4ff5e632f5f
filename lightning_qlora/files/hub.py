"""Folders of models by their names on the Hugging Face Hub, and the links in such a folder."""

import os
from pathlib import Path


def check_links(folder: Path) -> None:
    """Raise ValueError for a symbolic link to a file outside of a folder: the file would be copied into the output.

    Links of a snapshot in a Hugging Face cache to the `blobs` of its model are allowed.
    """
    inside = folder.resolve()
    if inside.parent.name == "snapshots":
        inside = inside.parents[1]
    for path in folder.iterdir():
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise ValueError(
                f"{path}: is a symbolic link to {path.resolve()}, outside of the folder. Put a copy of the file there."
            )


def resolve_model(name: str, download: bool = True) -> str:
    """Folder of a model: itself if it is a path, else the Hugging Face Hub's snapshot of that name.

    `download` is False for a name that was read from a file and that the user did not pass: then only the cache is
    searched. Raises FileNotFoundError if the name is neither.
    """
    if os.path.exists(name):
        return name
    files = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        from huggingface_hub import snapshot_download

        return snapshot_download(name, allow_patterns=files, local_files_only=not download)
    except (ImportError, OSError, ValueError) as error:
        if not download:
            raise FileNotFoundError(
                f"{name}: the file names this base model, and it is neither a folder nor in the cache of the Hugging "
                f"Face Hub. To download it, pass its name: base_model={name!r} (--base_model {name})."
            ) from error
        raise FileNotFoundError(
            f"{name}: neither a folder nor a model on the hub. Check the name, the connection, and that "
            "huggingface_hub is installed."
        ) from error
