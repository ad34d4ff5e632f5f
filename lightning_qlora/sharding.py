"""FSDP2 under the Trainer: the module is converted, whole and once, before `configure_model` shards a part of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.torch_version import TorchVersion

from lightning_qlora import seams
from lightning_qlora.choose import inside
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.convert import is_converted


@contextmanager
def converted_before_sharding(
    trainer: Trainer | None, config: QLoRAConfig, convert: Callable[[LightningModule], Any]
) -> Iterator[None]:
    """Within this, `convert` is called with the Trainer's module before `fully_shard` takes a part of it.

    Args:
        trainer: The Trainer; without one, or with another strategy than ModelParallelStrategy, nothing happens.
        config: The arguments of the conversion.
        convert: Converts the module.

    Raises:
        RuntimeError, ValueError: If this torch or this start can't be sharded, or layers are added after the first
            call of `fully_shard`.
    """
    if trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy):
        yield
        return
    module = trainer.lightning_module
    at_conversion: set[nn.Module] = set()

    def before(to_shard: list[nn.Module]) -> None:
        if not is_converted(module) and not set(module.modules()).isdisjoint(to_shard):
            _check_before(config)
            convert(module)
            at_conversion.update(module.modules())

    with seams.before_sharding(before):
        yield
    if at_conversion:
        _check_no_later_layers(module, at_conversion)


def _check_before(config: QLoRAConfig) -> None:
    """Refuse a torch whose FSDP2 takes no bytes, and a start that needs a batch, which comes after sharding.

    Raises:
        RuntimeError, ValueError: As above.
    """
    if torch.__version__ < TorchVersion("2.12"):
        raise RuntimeError(
            f"torch {torch.__version__}: its fully_shard takes no 4-bit weights, since it wants every parameter to be "
            "a float (pytorch issue 177844). FSDP2 with QLoRAPrecision needs torch 2.12 or newer."
        )
    if config.start == "calibrated":
        raise ValueError(
            "init_lora_weights='calibrated' can't start adapters that are sharded before a batch comes. Use 'loftq' or "
            "'pissa', which start before sharding."
        )


def _check_no_later_layers(module: nn.Module, at_conversion: set[nn.Module]) -> None:
    """Refuse layers that came after the module was converted: they are neither in 4 bits nor frozen.

    Raises:
        ValueError: As above; names one.
    """
    later = [name for name, part in module.named_modules() if part._parameters and part not in at_conversion]
    if later:
        raise ValueError(
            f"{later[0]}: was added after the first fully_shard, which the module was converted before, so "
            f"{len(later)} layers ({later[0]}, ...) would train in full in 16 or 32 bit. Build the whole model in "
            "configure_model before the first fully_shard."
        )


def check_shards(module: nn.Module) -> None:
    """Refuse parameters of several types that train in one FSDP2 group, of which torch says only the types.

    Raises:
        ValueError: As above; names two.
    """
    from torch.distributed.fsdp import FSDPModule

    groups = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    first: dict[str, tuple[str, Any]] = {}  # group -> name and type of its first parameter that trains
    for name, parameter in module.named_parameters():
        group = max((group for group in groups if inside(name, group)), key=len, default=None)
        if group is None or not parameter.requires_grad:
            continue
        other, dtype = first.setdefault(group, (name, parameter.dtype))
        if parameter.dtype is not dtype:
            raise ValueError(
                f"{name} ({parameter.dtype}) and {other} ({dtype}) train in one FSDP2 group ({group or 'the module'}), "
                "which takes one type: adapters are fp32. Call fully_shard on the modules in modules_to_save by "
                "themselves, or make them fp32."
            )
