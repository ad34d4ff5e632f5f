"""load_from_checkpoint: a trained module from a checkpoint that holds only the adapters."""

import inspect
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch import LightningModule
from torch import nn

from lightning_qlora.adapters.module_state import CONFIG_KEY, read_conversion, saved_layers
from lightning_qlora.checks import shown
from lightning_qlora.files.lightning_checkpoint import one_line_errors, read_checkpoint
from lightning_qlora.layers.dotted_names import last_part
from lightning_qlora.layers.names import named
from lightning_qlora.training.convert import convert_module
from lightning_qlora.training.module_hyperparameters import networks_of
from lightning_qlora.training.patches import converting_what_loads

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
        weights_only: As in `torch.load`; False loads hyperparameters of any class, and can run code of the file.
        **hyperparameters: Arguments of the class that replace those in the checkpoint. A network among them must be
            passed, since checkpoints don't hold it; with checkpoint="full" weights_only=False builds it anew.

    Returns:
        The module, on the device of the loaded adapters.

    Raises:
        ValueError: If the checkpoint was not saved from a converted module, or contains what weights_only refuses.
        CheckpointMismatchError: If the class builds a base model other than the one of the training.
    """
    if not isinstance(module_class, type):
        raise TypeError(f"module_class={shown(module_class)}: must be the class of the module, which is built anew.")
    weights_only = weights_only is not False  # None: Lightning runs the code of a file from the network
    if "://" in str(checkpoint_path):
        with one_line_errors(checkpoint_path):
            checkpoint = _load(checkpoint_path, map_location, weights_only=weights_only)
    else:  # a file is mapped, so that its values are not read here
        checkpoint = read_checkpoint(checkpoint_path, weights_only)
    held = checkpoint if isinstance(checkpoint, dict) else {}
    if not any(last_part(str(key)) == CONFIG_KEY for key in held.get("state_dict", {})):
        raise ValueError(
            f"{str(checkpoint_path)!r} holds no {CONFIG_KEY!r}: it was not saved from a converted module. Load it with "
            f"{module_class.__name__}.load_from_checkpoint."
        )
    with named(checkpoint_path):
        networks = networks_of(checkpoint.get("hyper_parameters"), hyperparameters, not weights_only)

    def convert(module: nn.Module, state: Mapping[str, Any]) -> None:
        with named(checkpoint_path):
            config, description = read_conversion(state)
            assert config is not None
        convert_module(module, config, saved=saved_layers(state, description))

    source: Any = checkpoint_path
    if not os.path.isfile(checkpoint_path):  # shards, or an address
        source = io.BytesIO()
        torch.save(checkpoint, source)
        source.seek(0)
    arguments = {"map_location": map_location, "weights_only": weights_only}
    if "weights_only" not in inspect.signature(module_class.load_from_checkpoint).parameters:
        del arguments["weights_only"]  # a class with a method of its own that decides this itself
    with converting_what_loads(convert):  # after `on_load_checkpoint`, which may edit the state
        module: Module = module_class.load_from_checkpoint(source, **arguments, **{**networks, **hyperparameters})
    return module
