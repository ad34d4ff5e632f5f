"""FSDP2 under the Trainer: what a module must be after `configure_model` has sharded it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_qlora.adapters.module_state import conversion_of
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.adapters.save_load import set_adapter_of_module
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.names import inside
from lightning_qlora.lightning_copies import classes
from lightning_qlora.training.convert_checks import LOAD_IN_CONFIGURE_MODEL, check_has_data


def shards_module(trainer: Trainer | None) -> bool:
    """Whether the strategy of a Trainer shards the parameters (FSDP2 or tensor parallelism)."""
    return trainer is not None and isinstance(trainer.strategy, classes(ModelParallelStrategy))


@contextmanager
def sharding_in_configure_model(trainer: Trainer | None, config: QLoRAConfig) -> Iterator[None]:
    """Within this (`configure_model`), a strategy that shards may let the module split its layers over ranks.

    At its end all weights of the module are there, and the adapters of a module that was converted within it are those
    to start from. ValueError if a part is on the meta device then.
    """
    yield
    if trainer is not None and shards_module(trainer):
        module = trainer.lightning_module
        check_has_data(module, advice=LOAD_IN_CONFIGURE_MODEL)
        if conversion_of(module) is not None and config.adapter is not None:
            set_adapter_of_module(module, read_adapter(config.adapter))  # on the meta device it had no effect


def check_fsdp_groups(module: nn.Module) -> None:
    """Raise ValueError if one FSDP2 group trains parameters of several dtypes; torch's own error does not name them."""
    from torch.distributed.fsdp import FSDPModule

    groups = [name for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    first: dict[str, tuple[str, Any]] = {}  # group -> name and dtype of its first trainable parameter
    for name, parameter in module.named_parameters():
        group = max((group for group in groups if inside(name, group)), key=len, default=None)
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
