"""Errors where Lightning would train the wrong parameters or lose the adapters without an error of its own."""

from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_qlora.checkpoints.saved_conversion import adapter_keys
from lightning_qlora.checks import TRAIN_IN_FULL, first_of
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.lightning_copies import classes


def check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """RuntimeError for a launcher that loses the adapters, and for callbacks on weights that conversion replaces."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, classes(_MultiProcessingLauncher)):
        raise RuntimeError(
            f"strategy='ddp_{launcher._start_method}' trains in processes spawned or forked from this one. When they "
            "end, Lightning copies back only the weights that the module in this process has, and it has no adapters: "
            "they would be lost without an error. Use strategy='ddp' in a script, torchrun, or devices=1 in a notebook."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, classes(BaseFinetuning)):
            raise RuntimeError(
                f"{name} freezes parameters before the module is converted, so their layers would stay dense, and "
                "train in full when it makes them trainable. Remove the callback. For what it should train beside the "
                f"adapters, {TRAIN_IN_FULL}."
            )
        attribute = _attribute_with_copy(callback, module)
        if attribute is not None:
            raise RuntimeError(
                f"{name} copied the module (its attribute {attribute!r}) before it was converted, and averages or "
                "restores full weights that the module no longer has. Call lightning_qlora.convert(module, ...) with "
                "the arguments of the plugin before the Trainer's method, so that the copy has the adapters; or remove "
                "the callback."
            )


def check_checkpoint(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Warn if a checkpoint lacks adapters that train."""
    keys = adapter_keys(checkpoint.get("state_dict", {}))
    layers = [name for name, layer in adapted_layers(module).items() if layer.lora_A.requires_grad]
    if len(keys) < len(layers):
        rank_zero_warn(
            f"The checkpoint has {len(keys)} of the adapters of {len(layers)} layers ({first_of(layers, 3)}), because "
            "code of the module or a callback removed the others (state_dict, on_save_checkpoint). It can't restore "
            "what they learned: let that code keep what ends in lora_A and lora_B."
        )


def _attribute_with_copy(callback: Callback, module: nn.Module) -> str | None:
    for name, value in vars(callback).items():
        copied = value.module if isinstance(value, AveragedModel) else value
        if type(copied) is type(module) and copied is not module and not adapted_layers(copied):
            return name
    return None
