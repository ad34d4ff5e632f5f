"""Frozen parameters that the module lets train again: `unfreeze()`, `requires_grad_(True)`, an encoder from epoch n on.

The adapters train then, as from the start, and 4-bit weights are no parameters. What is dense trains in full: a warning
says so once for each parameter, before the first step that changes it.
"""

from collections.abc import Collection, Iterable

from lightning.fabric.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_qlora.checks import first_of
from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.names import owner_name
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.layers.records import Frozen, frozen_parameters
from lightning_qlora.training.optimizers import parameters_of
from lightning_qlora.training.report import group, size_text

PREVENT = (
    "If it is not meant, set requires_grad only of the parameters that had it after conversion, for example of those "
    "with 'lora_' in their names."
)


def warn_of_thawed(module: nn.Module, optimizer: Optimizer, trained: set[int]) -> None:
    """Warn of frozen parameters that an optimizer trains in its next step.

    `trained` are the ids of the parameters that trained before; it gets those of this step, so each is named once.
    """
    new = {id(parameter) for parameter in parameters_of(optimizer) if parameter.requires_grad} - trained
    if not new:
        return
    trained |= new
    thawed = [each for each in frozen_parameters(module) if id(each.parameter) in new]
    layers = [each for each in thawed if not each.record.trained and _is_dense_layer(each.owner)]
    rest = [each for each in thawed if each.record.trained or not _is_dense_layer(each.owner)]
    if layers:
        names = sorted({owner_name(each.name) for each in layers})
        rank_zero_warn(
            f"{_sizes(layers)} of layers that the module froze before conversion train from now on: "
            f"{_groups(names)}. Conversion left these layers dense, so they train in full. To train them in 4 bits "
            f"with adapters, name them in target_modules, or unfreeze them before conversion. {PREVENT}"
        )
    if rest:
        rank_zero_warn(
            f"{_sizes(rest)} that were frozen by conversion train from now on, in full: "
            f"{_groups(each.name for each in rest)}. Checkpoints hold them too. If this is meant, name their modules "
            f"in modules_to_save, so that they train from the start. {PREVENT}"
        )


def _is_dense_layer(owner: nn.Module) -> bool:
    return is_linear(owner) and not isinstance(owner, PackedLayer)


def _sizes(parameters: Collection[Frozen]) -> str:
    tensors = {id(each.parameter): each.parameter for each in parameters}
    size = size_text(sum(tensor.nbytes for tensor in tensors.values()))
    return f"{len(tensors)} parameters ({size})"


def _groups(names: Iterable[str]) -> str:
    return first_of(dict.fromkeys(map(group, names)), 5)
