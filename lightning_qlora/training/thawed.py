"""Frozen parameters that the module lets train again: `unfreeze()`, `requires_grad_(True)`, an encoder from epoch n on.

The adapters train then, as from the start, and 4-bit weights are no parameters. What is dense trains in full: a warning
says so once for each parameter, before the first step that changes it.
"""

from collections.abc import Collection, Iterable

from lightning.fabric.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.names import owner_name
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.layers.records import Frozen, frozen_parameters
from lightning_qlora.training.report import group, size_text


class FrozenParameters:
    """The dense parameters of a converted module that are frozen, until they train again."""

    def __init__(self, module: nn.Module) -> None:
        self._frozen = frozen_parameters(module)

    def warn_of_thawed(self, optimizer: Optimizer) -> None:
        """Warn of those that an optimizer trains in its next step, each once."""
        trainable = [known for known in self._frozen if (p := known.parameter) is not None and p.requires_grad]
        if not trainable:
            return
        in_optimizer = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        thawed = [known for known in trainable if id(known.parameter) in in_optimizer]
        self._frozen = [known for known in self._frozen if known not in thawed]
        layers = [known for known in thawed if not known.trained and _is_dense_layer(known.owner())]
        rest = [known for known in thawed if known not in layers]
        if layers:
            names = sorted({owner_name(known.name) for known in layers})
            rank_zero_warn(
                f"{_sizes(layers)} of layers that the module froze before conversion train from now on: "
                f"{_groups(names)}. Conversion left these layers dense, so they train in full. To train them in 4 bits "
                f"with adapters, name them in target_modules, or unfreeze them before conversion. {PREVENT}"
            )
        if rest:
            names = [known.name for known in rest]
            rank_zero_warn(
                f"{_sizes(rest)} that were frozen by conversion train from now on, in full: {_groups(names)}. "
                "Checkpoints hold them too. If this is meant, name their modules in modules_to_save, so that they "
                f"train from the start. {PREVENT}"
            )


PREVENT = (
    "If it is not meant, set requires_grad only of the parameters that had it after conversion, for example of those "
    "with 'lora_' in their names."
)


def _is_dense_layer(owner: nn.Module | None) -> bool:
    return owner is not None and is_linear(owner) and not isinstance(owner, PackedLayer)


def _sizes(parameters: Collection[Frozen]) -> str:
    tensors = {id(known.parameter): known.parameter for known in parameters}
    size = size_text(sum(tensor.nbytes for tensor in tensors.values() if tensor is not None))
    return f"{len(tensors)} parameters ({size})"


def _groups(names: Iterable[str]) -> str:
    groups = list(dict.fromkeys(map(group, names)))
    return ", ".join(groups[:5]) + (", ..." if len(groups) > 5 else "")
