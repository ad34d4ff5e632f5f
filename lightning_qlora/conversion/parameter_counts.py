"""Numbers of parameters and bytes of a module; parameters that are shared count once."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from lightning_qlora.layers.lora_layer import ADAPTER
from lightning_qlora.layers.packed_layer import BASE, PackedLayer
from lightning_qlora.tensors.values import is_strided


class Counts(NamedTuple):
    """A 4-bit weight counts as its weights; torch does not say the bytes of sparse parameters, which count as none."""

    trainable: int  # parameters that train
    total: int  # all parameters
    bytes: int
    bytes_before: int  # without adapters, and with every 4-bit weight in its original type
    packed_bytes: int  # of 4-bit weights


def count_parameters(modules: Iterable[nn.Module]) -> Counts:
    trainable = total = dense_bytes = adapter_bytes = packed_bytes = float_bytes = 0
    seen: set[int] = set()
    of_adapters: set[int] = set()
    parts = [*modules]
    for layer in parts:
        if isinstance(layer, PackedLayer):
            weights = math.prod(layer._shape)
            total += weights
            packed_bytes += sum(tensor.nbytes for tensor in layer.weight_bytes[:3])
            float_bytes += weights * layer.weight_dtype.itemsize
            seen.update(id(layer._parameters.get(name)) for name in BASE)
            of_adapters.update(id(layer._parameters.get(name)) for name in ADAPTER)
    for part in parts:
        for parameter in part._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            trainable += parameter.numel() * parameter.requires_grad
            nbytes = parameter.nbytes if is_strided(parameter) else 0
            if id(parameter) in of_adapters:
                adapter_bytes += nbytes
            else:
                dense_bytes += nbytes
    return Counts(trainable, total, packed_bytes + dense_bytes + adapter_bytes, float_bytes + dense_bytes, packed_bytes)


def packed_layers(module: nn.Module) -> list[PackedLayer]:
    return [layer for layer in module.modules() if isinstance(layer, PackedLayer)]


def parameter_bytes(module: nn.Module) -> int:
    return count_parameters(module.modules()).bytes
