"""load_from_checkpoint: a trained module from a checkpoint that holds only the adapters."""

import inspect
import io
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.cloud_io import _load
from lightning.pytorch import LightningModule

from lightning_qlora.checkpoints.run_state import check_networks
from lightning_qlora.checkpoints.saved_conversion import adapter_keys, entry_of, read_conversion
from lightning_qlora.checks import shown
from lightning_qlora.conversion.convert import convert_module
from lightning_qlora.files.lightning_checkpoint import one_line_errors, read_checkpoint
from lightning_qlora.layers.names import last_part, named
from lightning_qlora.survey.records import CONVERSION, conversion_of

Module = TypeVar("Module", bound=LightningModule)
CLASS_PATH = "_class_path"  # LightningCLI's name of a hyperparameter
PLUGIN = "QLoRAPrecision"  # key of the plugin's state in a checkpoint of the Trainer


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
            passed, since checkpoints don't hold it.

    Returns:
        The module, on the device of the loaded adapters.

    Raises:
        ValueError: If the checkpoint was not saved from a converted module, or contains what weights_only refuses.
        CheckpointMismatchError: If the class builds a base model other than the one of the training.

    Example:
        ```python
        from lightning.pytorch import Trainer
        from lightning_qlora import QLoRAPrecision, load_from_checkpoint
        from my_module import MyModule, data

        trainer = Trainer(max_epochs=1, plugins=QLoRAPrecision(r=16))
        trainer.fit(MyModule(), data)
        trainer.save_checkpoint("tuned.ckpt")
        module = load_from_checkpoint(MyModule, "tuned.ckpt")
        ```
    """
    if not isinstance(module_class, type):
        raise TypeError(f"module_class={shown(module_class)}: must be the class of the module, which is built anew.")
    asked = weights_only
    weights_only = weights_only is not False  # None: Lightning runs the code of a file from the network
    if "://" in str(checkpoint_path):
        with one_line_errors(checkpoint_path):
            checkpoint = _load(checkpoint_path, map_location, weights_only=weights_only)
    else:  # a file is mapped, so that its values are not read here
        checkpoint = read_checkpoint(checkpoint_path, weights_only)
    text = _text_of_plugin(checkpoint, checkpoint_path, module_class.__name__)
    with named(checkpoint_path):
        check_networks(checkpoint.get("hyper_parameters"), hyperparameters)
        hyperparameters_of_file = checkpoint.get("hyper_parameters") or {}
        path = hyperparameters_of_file.pop(CLASS_PATH, None)  # Lightning would make that class, and not the one below
        if path not in (None, f"{module_class.__module__}.{module_class.__qualname__}"):
            raise ValueError(f"was saved from a {shown(path)}, which LightningCLI chose: pass it as module_class.")

    def load_state_dict(module: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        """After `on_load_checkpoint`, which may edit the state: convert, and load as the class does."""
        if not any(last_part(str(key)) in (CONVERSION, "lora_A") for key in state):  # pretrained values, in `__init__`
            return module_class.load_state_dict(module, state, *args, **kwargs)
        module.__class__ = module_class
        if text is not None:
            state = {CONVERSION: entry_of(text), **state}
        if CONVERSION in state and conversion_of(module) is None:
            with named(checkpoint_path):
                saved = read_conversion(state)
            assert saved is not None
            convert_module(module, saved.config, saved=saved.arguments_of_layers(state))
        return module.load_state_dict(state, *args, **kwargs)

    source: Any = checkpoint_path
    if path is not None or not os.path.isfile(checkpoint_path):  # shards, or an address
        source = io.BytesIO()
        torch.save(checkpoint, source)
        source.seek(0)
    arguments = {"map_location": map_location, "weights_only": weights_only}
    own = inspect.signature(module_class.load_from_checkpoint).parameters
    passes_on = asked is not None and any(each.kind is each.VAR_KEYWORD for each in own.values())
    if "weights_only" not in own and not passes_on:
        del arguments["weights_only"]  # a class with a method of its own that decides this itself
    # A class of the same name, since Lightning has no hook between building a module and loading its state.
    loading: Any = type(module_class.__name__, (module_class,), {"load_state_dict": load_state_dict})
    module: Module = loading.load_from_checkpoint(source, **arguments, **hyperparameters)
    return module


def _text_of_plugin(checkpoint: Any, path: str | Path, name: str) -> Any:
    """The conversion if only the plugin's state holds it; None if the module's state does.

    The plugin's has it too, for a module whose `on_save_checkpoint` keeps only what trains.
    """
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    state = checkpoint.get("state_dict", {})
    if any(last_part(str(key)) == CONVERSION for key in state):
        return None
    adapters = adapter_keys(state)
    if not adapters:
        raise ValueError(
            f"{str(path)!r} holds no {CONVERSION!r} and no adapters: it was not saved from a converted module. Load "
            f"it with {name}.load_from_checkpoint."
        )
    of_plugin = checkpoint.get(PLUGIN, {}).get(CONVERSION)
    if not isinstance(of_plugin, str):
        raise ValueError(
            f"{str(path)!r} holds the adapters of {len(adapters)} layers and no {CONVERSION!r}, which has the "
            "arguments of the conversion (r, lora_alpha, ...): on_save_checkpoint of the module, or other code, left "
            f"it out. Build the module, call lightning_qlora.convert(module, ...) with the arguments of the training, "
            'and module.load_state_dict(torch.load(PATH)["state_dict"], strict=False). To have it in the next '
            f"checkpoint, keep the key {CONVERSION!r} in on_save_checkpoint."
        )
    return of_plugin
