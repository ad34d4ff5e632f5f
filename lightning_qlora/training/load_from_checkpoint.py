"""load_from_checkpoint: a trained module from a checkpoint that holds only the adapters."""

import io
import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch import LightningModule

from lightning_qlora.adapters.module_state import CONFIG_KEY, read_conversion, saved_layers
from lightning_qlora.files.lightning_checkpoint import check_crc, one_line_errors, read_checkpoint
from lightning_qlora.layers.names import named
from lightning_qlora.training.convert import convert_module
from lightning_qlora.training.module_hyperparameters import networks_of

Module = TypeVar("Module", bound=LightningModule)


def load_from_checkpoint(
    module_class: type[Module],
    checkpoint_path: str | Path,
    map_location: Any = None,
    weights_only: bool | None = None,
    **hyperparameters: Any,
) -> Module:
    """Build a LightningModule with its base model, convert it with the checkpoint's arguments, and load the adapters.

    Args:
        module_class: The class that was trained; it must load the base model itself, as for training.
        checkpoint_path: A checkpoint of the Trainer or of ModelCheckpoint, in one file or in shards.
        map_location: As in `torch.load`; shards are loaded to host memory.
        weights_only: As in `LightningModule.load_from_checkpoint`; False loads hyperparameters of any class, and can
            run code that the file contains. None is True for a folder and for an http address, too.
        **hyperparameters: Arguments of the class that replace those in the checkpoint. A network among them must be
            passed, since checkpoints don't hold it; with checkpoint="full" weights_only=False builds it anew.

    Returns:
        The module, on the device of the loaded adapters.

    Raises:
        ValueError: If the checkpoint was not saved from a converted module, or contains what weights_only refuses.
        CheckpointMismatchError: If the class builds a base model other than the one of the training.
    """
    if os.path.isdir(checkpoint_path):
        checkpoint = read_checkpoint(checkpoint_path, weights_only is not False)
    else:
        if weights_only is None and str(checkpoint_path).startswith("http"):
            weights_only = True  # Lightning runs the code of a file from the network
        check_crc(checkpoint_path)
        with one_line_errors(checkpoint_path):
            checkpoint = _load(checkpoint_path, map_location, weights_only=weights_only)
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    state = checkpoint.get("state_dict", {})
    with named(checkpoint_path):
        config, description = read_conversion(state)
        networks = networks_of(checkpoint.get("hyper_parameters"), hyperparameters, weights_only is False)
    if config is None:
        raise ValueError(
            f"{str(checkpoint_path)!r} holds no {CONFIG_KEY!r}: it was not saved from a converted module. Load it with "
            f"{module_class.__name__}.load_from_checkpoint."
        )
    module = _build(module_class, checkpoint, weights_only, {**networks, **hyperparameters})
    convert_module(module, config, saved=saved_layers(state, description))
    module.load_state_dict(state)
    return module.to(next(iter(state.values())).device)


def _build(
    module_class: type[Module], checkpoint: dict[str, Any], weights_only: bool | None, hyperparameters: dict[str, Any]
) -> Module:
    """The module that Lightning builds from the checkpoint's hyperparameters, without its weights."""
    without_weights = io.BytesIO()
    torch.save({**checkpoint, "state_dict": {}}, without_weights)
    without_weights.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found keys that are in the model state dict|The state dict in")
        module: Module = module_class.load_from_checkpoint(
            without_weights, strict=False, weights_only=weights_only, **hyperparameters
        )
    return module
