"""Frozen copies of layers that are converted: a teacher or target network (BYOL, MoCo, DINO, DQN), a reference model.

They are converted too, each with the initial adapter of its original, which stays frozen. So code that averages the two
networks, or copies one into the other, finds the same parameters in both.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_qlora.layers.dtensor import is_sharded


def originals(frozen: Iterable[str], converted: Iterable[str], layers: Mapping[str, Any]) -> dict[str, str]:
    """Name of each frozen layer that has the weight of a layer to convert -> the name of that one.

    Of several the one whose name ends alike, since the blocks of an nn.TransformerEncoder begin with equal weights.
    """
    by_start: dict[Any, list[str]] = defaultdict(list)
    frozen = [name for name in frozen if _has_values(layers[name])]
    for name in converted if frozen else ():
        if _has_values(layers[name]):
            by_start[_start(layers[name].weight)].append(name)
    found = {}
    for name in frozen:
        weight = layers[name].weight
        equal = [other for other in by_start[_start(weight)] if torch.equal(weight, layers[other].weight)]
        if equal:
            endings = {other: len(os.path.commonprefix([name[::-1], other[::-1]])) for other in equal}  # noqa: RUF071
            found[name] = max(equal, key=endings.__getitem__)
    return found


def _has_values(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return weight is not None and not (weight.is_meta or isinstance(weight, FakeTensor) or is_sharded(weight))


def _start(weight: Any) -> Any:
    """What equal weights have in common, so that few are compared as a whole."""
    values: Tensor = weight.detach()[0, :8]
    return weight.shape, weight.dtype, weight.device, tuple(values.tolist())
