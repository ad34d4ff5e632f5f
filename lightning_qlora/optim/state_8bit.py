"""8-bit AdamW state: its keys, its blocks (also of sharded parameters), and how it is decoded to 32 bits.

Codes and scales have keys of their own: under torch's key `exp_avg`, AdamW would load codes as floats and train with
them.

Sharded parameters (FSDP2): each rank quantizes its shard, so no block spans two shards. Codes and scales are DTensors
like the parameter, and torch's distributed checkpoints save every rank's part. The number of shards is saved as
`shards`: for another number the moments are decoded and quantized again.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_qlora.kernels.adamw import LARGEST, STATE_BLOCK_SIZE, dequantize_state, quantize_state
from lightning_qlora.tensors.dtensor import local, shard_like

MOMENTS = ("exp_avg", "exp_avg_sq")  # the first is signed


def is_8bit(state: Mapping[Any, Any]) -> bool:
    return f"{MOMENTS[0]}_absmax" in state


def to_32bit(state: dict[Any, Any], betas: Any) -> dict[Any, Any]:
    """The state of a parameter for torch's AdamW: 8-bit moments decoded to fp32, other state unchanged.

    AdamW would divide by a second moment whose code is 0, since it was too small for the levels: it gets the value at
    which the first moment makes a step of one learning rate.
    """
    if not is_8bit(state):
        return state
    state = decode(state)
    m, v = (state[moment] for moment in MOMENTS)
    step = int(state["step"])
    beta1, beta2 = map(float, betas)
    m_hat = m / (1 - beta1**step)
    state[MOMENTS[1]] = torch.where(v == 0, (1 - beta2**step) * m_hat.square(), v).clamp(max=LARGEST)
    return state


def decode(state: dict[Any, Any]) -> dict[Any, Any]:
    state = dict(state)
    shards = int(state.pop("shards", 1))
    for moment in MOMENTS:
        codes = state.pop(f"{moment}_codes")
        absmax = state.pop(f"{moment}_absmax")
        state[moment] = _decode(codes, absmax, shards, signed=moment == MOMENTS[0])
    return state


def split_scales(param: Tensor, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """State with the scales of whole moments split as their parameter is."""
    return {key: shard_like(value, param) if str(key).endswith("_absmax") else value for key, value in state.items()}


def quantize_like(new: dict[str, Any], state: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """8-bit state that was saved in another number of shards, quantized in the blocks of `new`."""
    decoded = decode(state)
    for signed, moment in zip((True, False), MOMENTS, strict=True):
        values = local(shard_like(decoded[moment], param)).to(param.device)
        codes = local(new[f"{moment}_codes"])
        absmax = local(new[f"{moment}_absmax"])
        if values.numel():
            quantize_state(values, codes, absmax[: block_count(values.numel())], signed)
    return {**new, "step": decoded["step"]}


def _decode(codes: Tensor, absmax: Tensor, shards: int, signed: bool) -> Tensor:
    """Decode this rank's part of DTensors, or all shards of plain tensors."""
    if isinstance(codes, DTensor):
        values = dequantize_state(local(codes), local(absmax), signed)
        return _dtensor(values, codes, codes.shape, codes.stride())
    if shards == 1:
        return dequantize_state(codes, absmax, signed)
    parts = zip(codes.chunk(shards), absmax.chunk(shards), strict=False)  # the last ranks may have no rows
    return torch.cat([dequantize_state(part, scales, signed) for part, scales in parts])


def shard_count(param: Tensor) -> int:
    """The number of shards of a parameter, 1 if it is whole; 0 if it is not split once, by rows."""
    if not isinstance(param, DTensor):
        return 1
    sharded = [dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()]
    if not sharded:
        return 1
    if len(sharded) > 1 or not param.placements[sharded[0]].is_shard(0):
        return 0
    return int(param.device_mesh.size(sharded[0]))


def block_count(numel: int) -> int:
    return -(-numel // STATE_BLOCK_SIZE)


def zero_absmax(param: Tensor) -> Tensor:
    """A zero per block of a parameter: fp32 [blocks], or a DTensor [ranks * blocks of a shard]."""
    if not isinstance(param, DTensor):
        return torch.zeros(block_count(param.numel()), dtype=torch.float32, device=param.device)
    ranks = shard_count(param)
    rows = -(-param.shape[0] // ranks)  # of the largest shard: DTensor needs the same number of blocks on all ranks
    blocks = block_count(rows * (param.numel() // param.shape[0]))
    zeros = torch.zeros(blocks, dtype=torch.float32, device=local(param).device)
    return _dtensor(zeros, param, torch.Size([blocks * ranks]), (1,))


def _dtensor(part: Tensor, like: DTensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride)
