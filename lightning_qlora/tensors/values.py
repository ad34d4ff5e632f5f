"""Whether a tensor has values that can be read, and where they are."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values: those on the meta device and those of the planner have none."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor is elements in memory: not sparse, nested, quantized by torch, or in the layout of mkldnn."""
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def is_whole(tensor: Tensor) -> bool:
    """Whether a tensor is elements in memory, all of them on this rank."""
    return is_strided(tensor) and not isinstance(tensor, DTensor)


def can_be_read(tensor: Tensor) -> bool:
    """The same of one that has values, at least one."""
    return is_whole(tensor) and has_values(tensor) and tensor.numel() > 0


def is_plain(value: Any, kind: type[Tensor] = Tensor) -> bool:
    """Whether a value is of this class of torch and of no subclass; the tensors of the planner stand for one."""
    return type(value) in (kind, FakeTensor)


def moved(tensor: Tensor, device: torch.device | str, copy: bool = False) -> Tensor:
    """A tensor on a device; on the meta device it stays there, because its values are read later."""
    return tensor if tensor.is_meta else tensor.to(device, copy=copy)
