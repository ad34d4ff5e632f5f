"""FSDP2 under the Trainer: the whole module is converted once, before `configure_model` shards a part of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from lightning_qlora.adapters.module_state import conversion_of
from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.adapters.save_load import set_adapter_of_module
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.huggingface.load_without_data import check_unwritten
from lightning_qlora.layers.names import inside
from lightning_qlora.lightning_copies import classes
from lightning_qlora.training import patches
from lightning_qlora.training.convert_checks import LOAD_IN_CONFIGURE_MODEL, check_has_data


def shards_module(trainer: Trainer | None) -> bool:
    """Whether the strategy of a Trainer shards the parameters (FSDP2 or tensor parallelism)."""
    return trainer is not None and isinstance(trainer.strategy, classes(ModelParallelStrategy))


@contextmanager
def convert_before_sharding(
    trainer: Trainer | None, config: QLoRAConfig, convert: Callable[[LightningModule], Any]
) -> Iterator[None]:
    """Within this (`configure_model`), `convert` is called with the module before `fully_shard` shards a part of it.

    At its end all weights of the module are there, and its adapters are those to start from. It does nothing for a
    strategy that does not shard. ValueError if layers are added after the first call of `fully_shard`, values were
    written before it to a model whose weights are read after it, or a part is on the meta device at the end.
    """
    if trainer is None or not shards_module(trainer):
        yield
        return
    module = trainer.lightning_module
    at_conversion: set[nn.Module] = set()

    def before(to_shard: list[nn.Module]) -> None:
        parts = {part for each in to_shard for part in each.modules()}  # also of a block in a checkpoint_wrapper
        if conversion_of(module) is None and not parts.isdisjoint(module.modules()):
            check_unwritten(module)
            convert(module)
            at_conversion.update(module.modules())

    with patches.before_sharding(before):
        yield
    if at_conversion:
        _check_no_later_layers(module, at_conversion)
    if conversion_of(module) is not None:
        check_has_data(module, advice=LOAD_IN_CONFIGURE_MODEL)
        if config.adapter is not None:
            set_adapter_of_module(module, read_adapter(config.adapter))  # on the meta device it had no effect


def _check_no_later_layers(module: nn.Module, at_conversion: set[nn.Module]) -> None:
    """Raise ValueError for layers that were added after the conversion: they are neither in 4 bits nor frozen."""
    later = [name for name, part in module.named_modules() if part._parameters and part not in at_conversion]
    if later:
        raise ValueError(
            f"{later[0]}: was added after the first fully_shard, and the module is converted before that, so "
            f"{len(later)} layers ({later[0]}, ...) would train in full in 16 or 32 bit. Build the whole model in "
            "configure_model before the first fully_shard."
        )


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
                "which allows one dtype; adapters, and what trains in full in a 16-bit model, are fp32. Cast these "
                "modules to fp32, or call fully_shard on each of them."
            )
