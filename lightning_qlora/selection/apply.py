"""What the rows of a selection do to a module: 4-bit layers, and which parameters train."""

from collections.abc import Iterable

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from lightning_qlora.layers.kinds import decode_packed_layer, is_packed, pop_packed_weight
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import join, named
from lightning_qlora.layers.qlora_linear import REPLACED, QLoRALinear
from lightning_qlora.selection.selection import IN_MODULES_TO_SAVE, TRAIN, Row, Selection
from lightning_qlora.survey.records import Unrecorded, own_parameters, record
from lightning_qlora.survey.survey import Kind, Survey
from lightning_qlora.tensors.dtensor import is_sharded

IN_INIT = (
    "Folders in 8 or 4 bits are dequantized while they load in configure_model or plugin.init(): load the model there, "
    "and call load_from_checkpoint within plugin.init() of a plugin with the arguments of the training."
)

SHARDED = (
    "its weight is sharded already (a DTensor), and a shard can't be quantized. In configure_model, call "
    "self.trainer.precision_plugin.convert_module(self.model) before fully_shard or parallelize_module; in a "
    "loop of your own, lightning_qlora.convert(model). A model that configure_model loads with from_pretrained "
    "of transformers is in 4 bits already; pass no plan to it (tp_plan, distributed_config) elsewhere."
)


def convert_layers(seen: Survey, choice: Selection, device: torch.device | None) -> list[LoRALayer]:
    """Convert the chosen layers one after another, and return them; other layers in 4 bits become dense."""
    silent = bool(getattr(rank_zero_only, "rank", 0)) or None  # None: also where stderr is no terminal
    rows = choice.convert.values()
    layers = []
    for row in tqdm(rows, "Quantizing", leave=False, delay=2, unit=" layers", disable=silent):
        with named(row.name or type(row.owner).__name__):
            layers.append(_convert_row(row, device))
    for part in seen.parts:
        if part.kind is Kind.PACKED and not isinstance(part.owner, LoRALayer):
            decode_packed_layer(part.owner)
    return layers


def _convert_row(row: Row, device: torch.device | None) -> LoRALayer:
    """Quantize a layer, or the experts of a parameter; what was quantized while loading gets its name and arguments."""
    loaded = row.owner if row.stack is None else row.stack.layer
    if isinstance(loaded, LoRALayer):
        if is_sharded(loaded.lora_A) and not is_sharded(loaded.packed):  # else by a plan, while the model was loaded
            raise ValueError(SHARDED)
        assert row.config is not None
        loaded.set_arguments(row.config, row.name, loaded.seed_name)
        return loaded
    weight = row.owner._parameters.get(row.key)
    if weight is None:  # the parameters of another quantized format
        raise ValueError(f"has no float weight to quantize, but {', '.join(row.owner._parameters)}. {IN_INIT}")
    if is_sharded(weight):
        raise ValueError(SHARDED)
    trained = weight.requires_grad
    dtype = weight.dtype
    layer = convert_layer(row, device)
    record([Unrecorded(row.owner, row.key, trained, dtype)])
    layer.is_unfinished = True
    for parameter in layer.adapter_parameters():  # until the conversion ends, it counts as the layer that it was
        parameter.requires_grad_(trained)
    return layer


def convert_layer(row: Row, device: torch.device | None = None, weights: Iterable[Tensor] | None = None) -> LoRALayer:
    """Convert a layer, or a stack of experts, in place. For the arguments see `ExpertParameter.convert`."""
    assert row.config is not None
    if row.stack is not None:
        return row.stack.convert(row.config, row.name, device, row.seed_name, weights)
    layer = row.owner
    if is_packed(layer):
        setattr(layer.weight, REPLACED, layer)  # for an optimizer that was created before conversion
        return QLoRALinear.from_packed(layer, *pop_packed_weight(layer), row.config, row.name, row.seed_name)
    return QLoRALinear.from_linear(layer, row.config, row.name, device, row.seed_name)


def freeze(seen: Survey, choice: Selection, new: Iterable[Unrecorded], converted: Iterable[LoRALayer]) -> list[str]:
    """Let only adapters, and what was chosen to train in full, train; returns what trained and is frozen now.

    `new` are the parameters that no earlier conversion has seen; others do not change, except in modules_to_save.
    `converted` are the layers of this conversion, which ends for them. Linear layers are not in the result.
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
    trains = []
    for layer in converted:
        layer.is_unfinished = False
        trains += layer.adapter_parameters()
    if IN_MODULES_TO_SAVE in choice.train.values():
        for part in parts.values():
            for key, parameter in own_parameters(part.owner).items():
                row = choice.of_parameter(part, key)
                if row is not None and row.reason == IN_MODULES_TO_SAVE:
                    trains.append(parameter)
    for parameter in trains:
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return list(frozen)
