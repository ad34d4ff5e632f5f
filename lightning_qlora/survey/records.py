"""What conversion records: of a module its arguments; of a parameter if it trained, its type and fingerprint.

A record is an attribute of the module that holds the parameter, so it stays valid when that becomes a part of another
module. A parameter without a record has not been part of a conversion. A frozen parameter that was written to since, in
whatever way, has another fingerprint: each save reads them all. The record of a module is an entry of its state dict
too, with the same name, so that torch.distributed.checkpoint, which follows keys as attributes, finds it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.derived import Derived
from lightning_qlora.layers.lora_layer import ADAPTER, LoRALayer
from lightning_qlora.layers.names import join, owner_name
from lightning_qlora.layers.packed_layer import BASE
from lightning_qlora.tensors.device_types import IN_16_BITS
from lightning_qlora.tensors.fingerprint import fingerprints_of
from lightning_qlora.tensors.values import has_values, is_strided

CONVERSION = "_qlora_conversion"  # attribute of a converted module: its `Conversion`; key of `SavedConversion`
MERGED = "_qlora_merged"  # attribute of a module that was merged: a run that only evaluates it leaves it dense
RECORDS = "_qlora_records"  # attribute of a module: key of a parameter -> Record
OF_LAYERS = (*BASE, *ADAPTER)  # keys of parameters that conversion made


@dataclass
class Conversion:
    """The conversion of a module.

    Attributes:
        config: The arguments that checkpoints hold; an adapter that was loaded changes them.
        given: The arguments of every call that converted the module or a part of it, as they were passed; the last ones
            are those of this conversion.
        layers: Shape of each layer with an adapter, and of each embedding with rows that train, by name.
        buffers: Float buffer -> its fingerprint at conversion; adapter folders do not contain changed buffers.
    """

    config: QLoRAConfig
    given: list[QLoRAConfig]
    layers: dict[str, tuple[int, ...]]
    buffers: dict[str, int]


def conversion_of(module: nn.Module) -> Conversion | None:
    """The conversion of a module; None if it is not converted, or only as a part of another module."""
    return vars(module).get(CONVERSION)


def forget_conversion(module: nn.Module) -> None:
    """Remove the record, so that the module can be converted again; converted layers stay."""
    vars(module).pop(CONVERSION, None)


def record_merge(modules: Sequence[nn.Module]) -> None:
    """All layers in these modules are dense: what trained before conversion trains, and a conversion begins anew."""
    undo(modules)
    for part in modules:
        forget_conversion(part)
    vars(modules[0])[MERGED] = True


def was_merged(module: nn.Module) -> bool:
    """Whether the adapters of a module, or of a part of it, were merged, and it was not converted since."""
    return any(MERGED in vars(part) for part in module.modules())


def float_buffers(named: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of the float buffers in state dicts, such as the statistics of BatchNorm."""
    for name, part in named:
        for key, value in part.named_buffers(recurse=False):
            dense = value.is_floating_point() and is_strided(value) and has_values(value)
            if dense and key not in vars(part).get("_non_persistent_buffers_set", ()):
                yield join(name, key), value


class Record(NamedTuple):
    trained: bool  # whether it required a gradient before conversion
    dtype: torch.dtype  # its type before conversion; a wider one that it is held in has the same fingerprint
    fingerprint: int | None  # of its value, if it is dense and conversion froze it; 0: it had no value yet
    rounded: int | None = None  # of the value that it is held in, where that type rounds it


class Unrecorded(NamedTuple):
    owner: nn.Module
    key: str
    trained: bool
    dtype: torch.dtype


def own_parameters(owner: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module holds itself, by key; those of a ScriptModule are in no dict."""
    return {key: parameter for key, parameter in owner._parameters.items() if parameter is not None}


def unrecorded(modules: Iterable[nn.Module]) -> list[Unrecorded]:
    """The parameters in modules of which no conversion has ended; also weights that are in 4 bits already."""
    result = []
    for part in modules:
        for key, parameter in own_parameters(part).items():
            is_of_layer = isinstance(part, LoRALayer) and (key in OF_LAYERS or not part.is_unfinished)
            if not is_of_layer and key not in _records(part):
                result.append(Unrecorded(part, key, parameter.requires_grad, parameter.dtype))
        for key, layer in _loaded_layers(part):
            known = _records(part).get(key) or Record(layer.lora_A.requires_grad, layer.lora_A.dtype, None)
            result.append(Unrecorded(part, key, known.trained, known.dtype))
    return result


def _loaded_layers(part: Any) -> Iterator[tuple[str, LoRALayer]]:
    """The key of each weight that is in 4 bits before a conversion has ended, and its layer."""
    for name, layer in [("", part), *part._modules.items()]:
        if isinstance(layer, LoRALayer) and layer.is_unfinished:
            key = layer.weight_name(layer.reported_name(name))
            if key and not owner_name(key):  # else it is a weight of another module
                yield key, layer


def record(parameters: Iterable[Unrecorded]) -> None:
    places = [(each, own_parameters(each.owner).get(each.key)) for each in parameters]
    frozen = [(each.owner, value) for each, value in places if value is not None and not value.requires_grad]
    numbers = _fingerprints(frozen)
    for (owner, key, trained, dtype), parameter in places:
        vars(owner).setdefault(RECORDS, {})[key] = Record(trained, dtype, numbers.get(id(parameter)))


def is_recorded(owner: nn.Module) -> bool:
    """Whether a conversion has seen all parameters that a module holds itself, one at least, or made them."""
    if isinstance(owner, LoRALayer):
        return not owner.is_unfinished
    return RECORDS in vars(owner) and own_parameters(owner).keys() <= _records(owner).keys()


def was_frozen(owner: nn.Module, key: str) -> bool:
    record = _records(owner).get(key)
    return record is not None and not record.trained


class Frozen(NamedTuple):
    name: str
    owner: nn.Module
    key: str
    parameter: nn.Parameter
    record: Record


def frozen_parameters(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[Frozen]:
    """The dense parameters in modules that were frozen at the end of the conversion; tied ones several times."""
    for name, part in modules:
        parameters = own_parameters(part)
        for key, record in _records(part).items():
            if record.fingerprint is not None and key in parameters:
                yield Frozen(join(name, key), part, key, parameters[key], record)


def unchanged_fingerprints(modules: Iterable[tuple[str, nn.Module]]) -> dict[tuple[nn.Module, str], int]:
    """Owner and key of each frozen parameter with the value that conversion froze -> its fingerprint.

    It reads them all. Of a module that is sharded, all ranks must call it.
    """
    frozen = [each for each in frozen_parameters(modules) if not each.parameter.requires_grad]
    numbers = _fingerprints((each.owner, each.parameter) for each in frozen if each.record.fingerprint)
    unchanged = {}
    for _, owner, key, parameter, record in frozen:
        if record.fingerprint and numbers[id(parameter)] in (record.fingerprint, record.rounded):
            unchanged[owner, key] = record.fingerprint
    return unchanged


def has_fingerprint(number: int, owner: nn.Module, key: str, parameter: Tensor, numbers: dict[int, int]) -> bool:
    """Whether a file that has this number was written with this parameter; after a cast that rounded it: with that one.

    `numbers` has the fingerprints that were computed before, by the id of the parameter, and gets this one.
    """
    record = _records(owner).get(key)
    was_rounded = record is not None and torch.promote_types(parameter.dtype, record.dtype) is not parameter.dtype
    if record is not None and record.fingerprint and was_rounded:
        return number == record.fingerprint
    return number == _fingerprint(owner, parameter, numbers)


def record_rounded(modules: Iterable[tuple[str, nn.Module]]) -> None:
    numbers: dict[int, int] = {}
    for each in frozen_parameters(modules):
        dtype = each.parameter.dtype
        if each.record.fingerprint and dtype in IN_16_BITS and dtype is not each.record.dtype:
            rounded = _fingerprint(each.owner, each.parameter, numbers)
            replace_record(each, each.record._replace(rounded=rounded))


def replace_record(frozen: Frozen, record: Record) -> None:
    vars(frozen.owner)[RECORDS][frozen.key] = record


def renew(module: nn.Module) -> None:
    frozen = frozen_parameters(module.named_modules())
    record(Unrecorded(owner, key, old.trained, old.dtype) for _, owner, key, _, old in frozen)


def undo(modules: Iterable[nn.Module]) -> None:
    for part in modules:
        parameters = own_parameters(part)
        for key, record in vars(part).pop(RECORDS, {}).items():
            if key in parameters:
                parameters[key].requires_grad_(record.trained)


def _records(owner: nn.Module) -> dict[str, Record]:
    records: dict[str, Record] = vars(owner).get(RECORDS, {})
    return records


def _fingerprint(owner: nn.Module, parameter: Tensor, numbers: dict[int, int]) -> int:
    if id(parameter) not in numbers:
        numbers |= _fingerprints([(owner, parameter)])
    return numbers[id(parameter)]


def _fingerprints(parameters: Iterable[tuple[nn.Module, Tensor]]) -> dict[int, int]:
    """Id -> fingerprint of parameters with their owners; tied ones are read once."""
    first: dict[int, Tensor] = {}
    for owner, parameter in parameters:
        if id(parameter) not in first:
            first[id(parameter)] = owner.frozen_values(parameter) if isinstance(owner, Derived) else parameter
    return dict(zip(first, fingerprints_of(first.values()), strict=True))
