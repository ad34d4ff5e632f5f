"""Tensors of which every rank holds a part (FSDP2), the whole and the part of a whole; and values of all ranks."""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def world_size(group: Any = None) -> int:
    """Number of ranks of a group, None: of all; 1 without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(group)
    return 1


def of_all_ranks(value: Any, group: Any = None) -> list[Any]:
    """The value that each rank of a group, None: of all, passes, in rank order; all of them must call it."""
    values = [value] * world_size(group)
    if len(values) > 1:
        dist.all_gather_object(values, value, group)
    return values


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether this rank may hold only a part of a tensor."""
    return isinstance(tensor, DTensor)


def gather(tensor: Tensor) -> Tensor:
    """All of a tensor, on this rank; of a sharded one it is gathered, so all ranks must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Any) -> Any:
    """This rank's part of a sharded tensor; any other tensor, or None, as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor | None) -> Tensor:
    """A whole value, which every rank has, split as a sharded tensor is; any other value as it is."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float, *options: Any, **named: Any) -> Tensor:
    """torch's `clip_grad_norm_`, which takes no parameters that are split over several meshes, or some over none.

    `options` are `norm_type` and `error_if_nonfinite`; the result is the norm before clipping.
    """
    by_mesh: dict[Any, list[Tensor]] = {}  # the parameters with a gradient; None: those that are split over no mesh
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    gradients = [[cast(Tensor, parameter.grad) for parameter in group] for group in by_mesh.values()]
    norms = [gather(get_total_norm(group, *options, **named)) for group in gradients]
    norm = get_total_norm(norms, *options, **named)
    for group in by_mesh.values():
        clip_grads_with_norm_(group, max_norm, norm)
    return norm


def reshard(modules: Iterable[nn.Module]) -> None:
    """Reshard parameters that an evaluation gathered, and left in the type that it computed in."""
    from torch.distributed.fsdp import FSDPModule

    for part in modules:
        if isinstance(part, FSDPModule):
            part.reshard()


def local_part(value: Tensor, like: Tensor, device: torch.device) -> Tensor:
    """A copy, on a device, of what this rank holds of a value, sharded as `like` is, in the type of `like`.

    `like` may be on the meta device. Of a value that is mapped from a file, only this part is read.
    """
    if not isinstance(like, DTensor):
        return value.to(device, like.dtype, copy=True)
    part: Any = torch.empty_like(like, device=device)
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    place = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    part.to_local().copy_(value[place])
    return part  # type: ignore[no-any-return]


def own_rows(tensor: Tensor) -> tuple[Tensor, int, Any] | None:
    """The rows that this rank holds, the number of elements before them, and the group that holds all rows.

    None if the tensor is not sharded, or not by rows alone.
    """
    if not isinstance(tensor, DTensor):
        return None
    shards = [number for number, kind in enumerate(tensor.placements) if not kind.is_replicate()]
    kinds = [tensor.placements[number] for number in shards]
    if kinds != [Shard(0)] or type(kinds[0]) is not Shard:
        return None
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset[0] * tensor.stride(0), tensor.device_mesh.get_group(shards[0])
