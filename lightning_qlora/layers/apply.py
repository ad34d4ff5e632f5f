"""What the rows of a selection do to a module: 4-bit layers, which parameters train, and single rows that train."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_qlora.layers.experts import QLoRAExperts
from lightning_qlora.layers.kinds import is_packed, pop_packed_weight
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import join
from lightning_qlora.layers.qlora_linear import REPLACED, QLoRALinear
from lightning_qlora.layers.records import Unrecorded, own_parameters
from lightning_qlora.layers.selection import IN_MODULES_TO_SAVE, TRAIN, Row, Selection
from lightning_qlora.layers.survey import Survey
from lightning_qlora.layers.trainable_tokens import train_tokens


def convert_layer(row: Row, device: torch.device | None = None, weights: Iterable[Tensor] | None = None) -> LoRALayer:
    """Convert a layer, or a stack of experts, in place. For the arguments see `QLoRAExperts.from_parameter`."""
    assert row.config is not None
    if row.stack is not None:
        return QLoRAExperts.from_parameter(row.stack, row.config, row.name, device, row.seed_name, weights)
    layer = row.owner
    if is_packed(layer):
        setattr(layer.weight, REPLACED, layer)  # for an optimizer that was created before conversion
        QLoRALinear.from_packed(layer, *pop_packed_weight(layer), row.config, row.name, row.seed_name)
    else:
        QLoRALinear.from_linear(layer, row.config, row.name, device, row.seed_name)
    assert isinstance(layer, QLoRALinear)
    return layer


def freeze(seen: Survey, choice: Selection, new: Iterable[Unrecorded], converted: Iterable[LoRALayer]) -> list[str]:
    """Let only adapters, and what was chosen to train in full, train; returns what trained and is frozen now.

    `new` are the parameters that no earlier conversion has seen; others do not change, except in modules_to_save.
    `converted` are the layers of this conversion. Linear layers are not in the result.
    """
    parts = {id(part.owner): part for part in seen.parts if part.stack is None}
    frozen: dict[str, None] = {}
    for owner, key, trained, _ in new:
        parameter = own_parameters(owner).get(key)
        if parameter is None or not (parameter.is_floating_point() or parameter.is_complex()):
            continue
        part = parts[id(owner)]
        row = choice.of_parameter(part, key)
        parameter.requires_grad_(row is not None and row.action == TRAIN)
        if trained and row is None:
            frozen[join(part.names.full, key if owner._modules else "")] = None
    trains = [parameter for layer in converted for parameter in layer.adapter_parameters()]
    for part in parts.values():
        for key, parameter in own_parameters(part.owner).items():
            row = choice.of_parameter(part, key)
            if row is not None and row.reason == IN_MODULES_TO_SAVE:
                trains.append(parameter)
    for parameter in trains:
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return list(frozen)


def add_tokens(seen: Survey, tokens: dict[str, list[int]]) -> None:
    """Let rows of frozen embeddings train; layers with a tied weight share them."""
    modules = dict(seen.modules) if tokens else {}
    tied: dict[int, list[str]] = {}
    for name in tokens:
        tied.setdefault(id(modules[name]._parameters.get("weight")), []).append(name)
    for names in tied.values():
        train_tokens([modules[name] for name in names], tokens[names[0]])
