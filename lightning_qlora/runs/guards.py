"""Errors where Lightning would train the wrong parameters or lose the adapters without an error of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lightning_qlora.checkpoints.saved_conversion import adapter_keys
from lightning_qlora.checks import TRAIN_IN_FULL, first_of
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import inside, join, name_endings, without_wrappers
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.lightning_copies import classes
from lightning_qlora.survey.parts import Parts

NOT_AVERAGED = (
    "The module was converted inside of DistributedDataParallel, which averages the gradients of the parameters that "
    "it had when it was made, so the ranks would train apart. Convert, or merge and convert again, and then wrap the "
    "module in a new DistributedDataParallel (fabric.setup); with the Trainer do it between two runs (trainer.fit)."
)


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
        if isinstance(callback, classes(ModelPruning)):
            raise RuntimeError(
                f"{name} sets entries of float weights to zero, and the weights of converted layers are 4-bit and "
                "frozen. Remove the callback; to prune, merge the adapters first (lightning_qlora.merge) and prune "
                "the dense module."
            )
        attribute = _attribute_with_copy(callback, module)
        if attribute is not None:
            raise RuntimeError(
                f"{name} copied the module (its attribute {attribute!r}) before it was converted, and averages or "
                "restores full weights that the module no longer has. Call lightning_qlora.convert(module, ...) with "
                "the arguments of the plugin before the Trainer's method, so that the copy has the adapters; or remove "
                "the callback."
            )


def check_fsdp_groups(module: nn.Module) -> None:
    """Raise ValueError if one FSDP2 group trains parameters of several dtypes; torch's own error does not name them."""
    from torch.distributed.fsdp import FSDPModule

    groups = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    first: dict[str, tuple[str, Any]] = {}  # group -> name and dtype of its first trainable parameter
    for name, parameter in module.named_parameters():
        group = max((group for group in groups if inside(name, group)), default=None)  # the innermost
        if group is None or not parameter.requires_grad:
            continue
        other, dtype = first.setdefault(group, (name, parameter.dtype))
        if parameter.dtype is not dtype:
            raise ValueError(
                f"{name} ({parameter.dtype}) and {other} ({dtype}) train in one FSDP2 group ({group or 'the module'}), "
                "which allows one dtype; adapters, and what trains in full in a 16-bit model, are fp32. Call "
                "self.trainer.precision_plugin.convert_module(self.model) before fully_shard, or cast these modules "
                "to fp32, or call fully_shard on each of them."
            )


def refuse_old_wrappers(module: nn.Module) -> None:
    """Let a forward pass of a converted module raise RuntimeError in a wrapper that does not average its adapters."""
    if _check_wrapper not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_check_wrapper)


def _check_wrapper(module: nn.Module, _: Any) -> None:
    wrapper = None if torch.compiler.is_compiling() else DistributedDataParallel._active_ddp_module
    if wrapper is None or not torch.is_grad_enabled():
        return
    layer = next((part for part in module.modules() if isinstance(part, LoRALayer)), None)
    if layer is None or any(parameter is layer.lora_A for parameter in wrapper._module_parameters):
        return
    for name, parameter in wrapper.module.named_parameters():
        if parameter is layer.lora_A and parameter.requires_grad and name not in wrapper.parameters_to_ignore:
            raise RuntimeError(NOT_AVERAGED)


def check_state_dict(module: nn.Module) -> None:
    missing = _missing_adapters(module, module.state_dict())
    if missing:
        layers = adapted_layers(module)
        raise RuntimeError(
            f"{type(module).__name__}.state_dict() leaves out the adapters of {len(missing)} of {len(layers)} layers "
            f"({first_of(missing, 3)}), so no checkpoint would hold what they learn. Frozen weights are in no "
            "checkpoint of a converted module: remove the override or the hook that leaves them out, or let it keep "
            "what ends in lora_A and lora_B."
        )


def check_checkpoint(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """ValueError for adapters with NaN or Inf, before a checkpoint is written; a warning if it lacks adapters."""
    Parts.of(module).check_adapters_finite()
    missing = _missing_adapters(module, checkpoint.get("state_dict", {}))
    if missing:
        rank_zero_warn(
            f"The checkpoint lacks the adapters of {len(missing)} layers ({first_of(missing, 3)}), because code of the "
            "module or a callback removed them (on_save_checkpoint). It can't restore what they learned."
        )


def _missing_adapters(module: nn.Module, state_dict: Mapping[str, Any]) -> list[str]:
    """Names of the layers whose adapters train and are in a state dict under none of their names.

    A key may lack the first parts of a name, or have others before it: `state_dict` may return that of a part.
    """
    keys = set(map(without_wrappers, adapter_keys(state_dict)))
    endings = {ending for key in keys for ending in name_endings(key)}
    present = set()
    for name, layer in module.named_modules(remove_duplicate=False):
        key = join(without_wrappers(name), "lora_A")
        if isinstance(layer, LoRALayer) and (key in endings or not keys.isdisjoint(name_endings(key))):
            present.add(layer)
    layers = adapted_layers(module).items()
    return [name for name, layer in layers if layer.lora_A.requires_grad and layer not in present]


def _attribute_with_copy(callback: Callback, module: nn.Module) -> str | None:
    for name, value in vars(callback).items():
        copied = value.module if isinstance(value, AveragedModel) else value
        if type(copied) is type(module) and copied is not module and not adapted_layers(copied):
            return name
    return None
