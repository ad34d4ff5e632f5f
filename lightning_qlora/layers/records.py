"""What conversion records of a parameter: whether it trained before, and the value that was frozen.

The record is an attribute of the module that holds the parameter, so it stays valid when that becomes a part of another
module. A parameter without a record has not been part of a conversion.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.fingerprint import fingerprint, has_values
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import join
from lightning_qlora.layers.trainable_tokens import without_tokens

RECORDS = "_qlora_records"  # attribute of a module: key of a parameter -> Record


class Value(NamedTuple):
    """The value of a parameter when it was last read."""

    version: int
    dtype: torch.dtype
    shape: torch.Size
    address: int  # `parameter.data = tensor` changes it, but not the version
    fingerprint: int

    @staticmethod
    def of(parameter: Tensor, number: int) -> "Value":
        """The value of a parameter whose fingerprint is known."""
        address = 0
        if has_values(parameter) and not is_sharded(parameter):
            address = parameter.data_ptr()
        return Value(parameter._version, parameter.dtype, parameter.shape, address, number)


class Record(NamedTuple):
    """What conversion records of a parameter."""

    trained: bool  # whether it required a gradient before conversion
    frozen: Value | None  # its value, if it is dense and conversion froze it


class Unrecorded(NamedTuple):
    """A parameter that no conversion has seen, before conversion."""

    owner: nn.Module
    key: str
    trained: bool


def own_parameters(owner: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a module holds itself, by key; those of a ScriptModule are in no dict."""
    return {key: parameter for key, parameter in owner._parameters.items() if parameter is not None}


def unrecorded(module: nn.Module) -> list[Unrecorded]:
    """The float parameters of a module that no conversion has seen; of a layer that was quantized while loading too."""
    result = []
    for part in module.modules():
        parameters: dict[str, Any] = own_parameters(part)
        if isinstance(part, LoRALayer):
            parameters = {}
            if part.loaded:
                parameters = {"weight": part.lora_A, "bias": part._parameters.get("bias")}
        for key, parameter in parameters.items():
            if parameter is not None and key not in _records(part):
                result.append(Unrecorded(part, key, parameter.requires_grad))
    return result


def record(parameters: Iterable[Unrecorded]) -> None:
    """Record the parameters after conversion decided which of them are frozen."""
    values: dict[int, Value] = {}  # tied parameters are read once
    for owner, key, trained in parameters:
        parameter = own_parameters(owner).get(key)
        frozen = None
        if parameter is not None and not parameter.requires_grad:
            if id(parameter) not in values:
                values[id(parameter)] = Value.of(parameter, _fingerprint(owner, parameter))
            frozen = values[id(parameter)]
        vars(owner).setdefault(RECORDS, {})[key] = Record(trained, frozen)


def is_recorded(owner: nn.Module) -> bool:
    """Whether a conversion has seen all parameters that a module holds itself, one at least, or made them."""
    if isinstance(owner, LoRALayer):
        return not owner.loaded
    return RECORDS in vars(owner) and own_parameters(owner).keys() <= _records(owner).keys()


class Frozen(NamedTuple):
    """A dense parameter that was frozen at the end of conversion."""

    name: str
    owner: nn.Module
    parameter: nn.Parameter
    trained: bool  # before conversion


def frozen_parameters(module: nn.Module) -> Iterator[Frozen]:
    """The dense parameters of a module that were frozen at the end of its conversion; tied ones several times."""
    for name, part in module.named_modules():
        parameters = own_parameters(part)
        for key, (trained, frozen) in _records(part).items():
            if frozen is not None and key in parameters:
                yield Frozen(join(name, key), part, parameters[key], trained)


def base_fingerprint(owner: nn.Module, key: str, parameter: Tensor) -> int | None:
    """The fingerprint of a frozen dense parameter with the value that conversion froze; None for any other.

    Only a parameter that was written to is read.
    """
    frozen = _frozen(owner, key)
    if frozen is None or parameter.requires_grad or parameter.shape != frozen.shape:
        return None
    value = Value.of(parameter, frozen.fingerprint)
    moved = value.address != frozen.address and value.dtype is frozen.dtype and not is_sharded(parameter)
    if value.version != frozen.version or moved:
        if _fingerprint(owner, parameter) != frozen.fingerprint:
            return None  # it was replaced, or trained for a while and frozen again
        records = _records(owner)
        records[key] = records[key]._replace(frozen=value._replace(dtype=frozen.dtype))
    return frozen.fingerprint


def current_fingerprint(owner: nn.Module, key: str, parameter: Tensor) -> int:
    """The fingerprint of a parameter as it is now; after a cast: the fingerprint before it."""
    frozen = _frozen(owner, key)
    if frozen is not None and frozen.dtype is not parameter.dtype and frozen.shape == parameter.shape:
        return frozen.fingerprint
    return _fingerprint(owner, parameter)


def renew(module: nn.Module) -> None:
    """Record the present values of the frozen parameters as those of the base."""
    record(
        Unrecorded(part, key, trained)
        for part in module.modules()
        for key, (trained, frozen) in _records(part).items()
        if frozen is not None
    )


def undo(module: nn.Module) -> None:
    """Let each parameter require a gradient if it did before conversion, and remove all records."""
    for part in module.modules():
        parameters = own_parameters(part)
        for key, (trained, _) in vars(part).pop(RECORDS, {}).items():
            if key in parameters:
                parameters[key].requires_grad_(trained)


def _records(owner: nn.Module) -> dict[str, Record]:
    records: dict[str, Record] = vars(owner).get(RECORDS, {})
    return records


def _frozen(owner: nn.Module, key: str) -> Value | None:
    record = _records(owner).get(key)
    return None if record is None else record.frozen


def _fingerprint(owner: nn.Module, parameter: Tensor) -> int:
    return fingerprint(without_tokens(owner, parameter))
