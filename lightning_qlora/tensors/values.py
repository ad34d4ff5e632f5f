"""Whether a tensor has values that can be read, and where."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values: those on the meta device and those of the planner have none."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor is elements in memory: not sparse, nested, quantized by torch, or in the layout of mkldnn."""
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def is_plain(value: Any, kind: type[Tensor] = Tensor) -> bool:
    """Whether a value is of this class of torch and of no subclass; the tensors of the planner stand for one."""
    return type(value) in (kind, FakeTensor)


def moved(tensor: Tensor, device: torch.device | str, copy: bool = False) -> Tensor:
    """A tensor on a device; on the meta device it stays there, because its values are read later."""
    return tensor if tensor.is_meta else tensor.to(device, copy=copy)
