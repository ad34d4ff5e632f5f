"""load_from_checkpoint: a trained module from a checkpoint that holds the adapters alone."""

import io
import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch import LightningModule

from lightning_qlora.checkpoint_file import errors_in_one_line, read_checkpoint
from lightning_qlora.convert import convert_module
from lightning_qlora.state import CONFIG, config_of

Module = TypeVar("Module", bound=LightningModule)


def load_from_checkpoint(
    module_class: type[Module],
    checkpoint_path: str | Path,
    map_location: Any = None,
    weights_only: bool | None = None,
    **hyperparameters: Any,
) -> Module:
    """Build a LightningModule, its base included, convert it as the checkpoint says, and load the adapters.

    Args:
        module_class: The class that was trained; it must load the base model itself, as it did for training.
        checkpoint_path: A checkpoint of the Trainer or of ModelCheckpoint, in one file or in shards.
        map_location: As in `torch.load`; shards come to host memory.
        weights_only: As in `LightningModule.load_from_checkpoint`; False reads hyperparameters of any class, and can
            run code of whoever wrote the file.
        **hyperparameters: Arguments of the class, where the checkpoint's own do not do.

    Raises:
        ValueError: If the checkpoint was not saved from a converted module, or holds what weights_only refuses.
        CheckpointMismatchError: If the class builds another base than the one that was trained on.
    """
    if os.path.isdir(checkpoint_path):
        checkpoint = read_checkpoint(checkpoint_path, weights_only is not False)
    else:
        with errors_in_one_line(checkpoint_path):
            checkpoint = _load(checkpoint_path, map_location, weights_only=weights_only)
    state = checkpoint.get("state_dict", {}) if isinstance(checkpoint, dict) else {}
    config = config_of(state)
    if config is None:
        raise ValueError(
            f"{str(checkpoint_path)!r} holds no {CONFIG!r}: it was not saved from a converted module. Load a plain "
            f"checkpoint with {module_class.__name__}.load_from_checkpoint."
        )
    module = _build(module_class, checkpoint, weights_only, hyperparameters)
    convert_module(module, config)
    module.load_state_dict(state)
    return module.to(next(iter(state.values())).device)


def _build(
    module_class: type[Module], checkpoint: dict[str, Any], weights_only: bool | None, hyperparameters: dict[str, Any]
) -> Module:
    """The module that Lightning builds from the checkpoint's hyperparameters, nothing loaded into it yet."""
    without_weights = io.BytesIO()
    torch.save({**checkpoint, "state_dict": {}}, without_weights)
    without_weights.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found keys that are in the model state dict|The state dict in")
        module: Module = module_class.load_from_checkpoint(
            without_weights, strict=False, weights_only=weights_only, **hyperparameters
        )
    return module
