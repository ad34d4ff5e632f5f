"""What a file says of new parts decides, in a module that was converted before the file was read.

Which parts are new follows from their values. Those of a run that is resumed may be others: what a checkpoint holds was
not loaded again, or its version did not ask values.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_qlora.dtypes.full_precision import release, undo_full_precision
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import owner_name, stack_of
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.records import (
    BY_VALUES,
    ORIGINS,
    Conversion,
    forget_conversion,
    origins_by_name,
    own_parameters,
    undo,
)
from lightning_qlora.tensors.dtensor import is_sharded
from lightning_qlora.texts import groups

Convert = Callable[[nn.Module], object]


def convert_as_recorded(
    parts: Parts, origins: Mapping[str, str], conversion: Conversion, convert: Convert | None = None
) -> Parts:
    """Convert those parts again of which a file says otherwise; returns the parts of the module then.

    `origins`: name of each parameter that the file knows -> why it was new by its values, "" if it was not. `convert`
    converts what in the module is not converted; None: with the arguments of the conversion.
    """
    changed: dict[nn.Module, str] = {}
    for name, owner, key, origin in [*origins_by_name(parts.places)]:
        recorded = origins.get(name, origin)
        is_layer = isinstance(owner, LoRALayer) or stack_of(owner, key) is not None
        if is_layer and not recorded.startswith(BY_VALUES):
            continue  # if it looks new, it is a layer because it was named
        if origin.startswith(BY_VALUES) != recorded.startswith(BY_VALUES):
            changed[owner] = owner_name(name)
            same = [key] if owner._modules else [*vars(owner)[ORIGINS]]  # what has no parts is decided as a whole
            vars(owner)[ORIGINS] |= dict.fromkeys(same, recorded)
    if not changed or any(is_sharded(tensor) for owner in changed for tensor in own_parameters(owner).values()):
        return parts
    values = _undo(parts, changed.keys())
    if convert is None:
        conversion.convert_again(parts.root, conversion.config)
    else:
        convert(parts.root)
    for parameter, value in values:
        parameter.data.copy_(value)
    rank_zero_info(f"QLoRA: as in the file that is loaded, and not by their values: {groups(changed.values())}.")
    return Parts.of(parts.root)


@torch.no_grad()
def _undo(parts: Parts, owners: Collection[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Let modules be as before conversion; the weights of 4-bit layers are decoded.

    Returns the parameters that are held in fp32, with their values: they have their types before now.
    """
    release(parts.modules)
    values = undo_full_precision(parts.named, Tensor.to)
    modules = dict(parts.named)
    for name, layer in parts.layers.items():
        if modules[owner_name(layer.weight_name(name))] in owners:
            layer.become_dense(nn.Parameter(layer.decode(), requires_grad=False), name, modules)
    undo(owners)
    forget_conversion(parts.root)
    return values
