"""8-bit state of sharded parameters (FSDP2): each rank quantizes its own shard, in blocks of its own.

Codes and scales are DTensors like the parameter, so that torch's distributed checkpoints save every rank's part. Blocks
do not reach across shards, so such a state loads on as many ranks as it was saved on: `shards` is kept with it.
"""

from typing import Any

import torch
from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def shards(param: Tensor) -> int:
    """In how many parts a parameter is split; 1 for a plain tensor.

    Raises:
        ValueError: If it is not split along its first dimension alone, as `fully_shard` splits.
    """
    if not hasattr(param, "to_local"):
        return 1
    sharded: Any = param
    dims = [dim for dim, placement in enumerate(sharded.placements) if not placement.is_replicate()]
    if len(dims) != 1 or not sharded.placements[dims[0]].is_shard(0):
        raise ValueError(
            f"PagedAdamW8bit got a parameter placed as {tuple(sharded.placements)}: it trains parameters that are "
            "split along their first dimension, as fully_shard splits them. Use PagedAdamW for others."
        )
    count: int = sharded.device_mesh.size(dims[0])
    return count


def zero_scales(param: Tensor, block_size: int) -> Tensor:
    """One zero for each block of a parameter: fp32 [ceil(n / block_size)], sharded as the parameter is."""
    if not hasattr(param, "to_local"):
        return torch.zeros(-(-param.numel() // block_size), dtype=torch.float32, device=param.device)
    from torch.distributed.tensor import DTensor

    sharded: Any = param
    ranks = shards(param)
    rows = -(-sharded.shape[0] // ranks)  # of the largest shard; all ranks keep as many blocks
    blocks = -(-rows * (sharded.numel() // sharded.shape[0]) // block_size)
    zeros = torch.zeros(blocks, dtype=torch.float32, device=local(param).device)
    return DTensor.from_local(
        zeros, sharded.device_mesh, sharded.placements, run_check=False, shape=torch.Size([blocks * ranks]), stride=(1,)
    )
