"""Tensors of which every rank holds a part (FSDP2's parameters): the whole of one, and the part of a whole."""

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


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


def reshard(module: nn.Module) -> None:
    """Reshard parameters that an evaluation gathered, and left in the type that it computed in."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
