"""Tensors of which every rank holds a part (FSDP2's parameters): the whole of one, and the part of a whole."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this rank may hold only a part of a tensor."""
    return isinstance(tensor, DTensor)


def gather(tensor: Tensor) -> Tensor:
    """All of a tensor, on this rank; of a sharded one it is gathered, so all ranks must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, held: Tensor | None) -> Tensor:
    """A whole value, which every rank has, split as a sharded tensor is; any other value as it is."""
    if not isinstance(held, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(held.device), held.device_mesh, held.placements, src_data_rank=None)


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> None:
    """torch's `clip_grad_norm_`, which takes no parameters that are split over several meshes, or some over none."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if (grad := parameter.grad) is not None:
            groups.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(parameter)
    norms = [gather(get_total_norm([p.grad for p in group if p.grad is not None])) for group in groups.values()]
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, torch.stack(norms).norm())


def reshard(module: nn.Module) -> None:
    """Reshard parameters that an evaluation gathered, and left in the type that it computed in."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
