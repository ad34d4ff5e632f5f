"""The names that 8-bit moments have in an optimizer's state, and how an optimizer of 32 bits reads them.

Codes have a name of their own: under torch's `exp_avg` AdamW would load them, cast to floats, and train on them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.kernels.adamw import dequantize_state
from lightning_qlora.paging.sharded import local

MOMENTS = ("exp_avg", "exp_avg_sq")  # the first is signed


def codes_of(moment: str) -> str:
    """Key of a moment's uint8 codes."""
    return f"{moment}_codes"


def scales_of(moment: str) -> str:
    """Key of a moment's fp32 scales, one a block."""
    return f"{moment}_absmax"


def in_8bit(state: Mapping[Any, Any]) -> bool:
    """Whether the state of a parameter is in 8 bits."""
    return scales_of(MOMENTS[0]) in state


def with_codes_named(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The state of a parameter; codes that were saved under torch's names, as at first, get their own."""
    own = {moment: codes_of(moment) for moment in MOMENTS if in_8bit(state)}
    return {own.get(key, key): value for key, value in state.items()}


def in_32bit(state: dict[Any, Any]) -> dict[Any, Any]:
    """The state of a parameter as torch's AdamW keeps it: 8-bit moments decoded to fp32; any other state as it is."""
    if not in_8bit(state):
        return state
    named = with_codes_named(state)
    shards = int(named.pop("shards", 1))
    for moment in MOMENTS:
        codes, scales = named.pop(codes_of(moment)), named.pop(scales_of(moment))
        named[moment] = _decode(codes, scales, shards, signed=moment == MOMENTS[0])
    return named


@torch.no_grad()
def _decode(codes: Tensor, scales: Tensor, shards: int, signed: bool) -> Tensor:
    """Of one rank's part if they are DTensors; else of all shards, each of which has blocks of its own."""
    if hasattr(codes, "to_local"):
        from torch.distributed.tensor import DTensor

        sharded: Any = codes
        values = dequantize_state(local(codes), local(scales), signed)
        mesh, placements = sharded.device_mesh, sharded.placements
        return DTensor.from_local(
            values, mesh, placements, run_check=False, shape=sharded.shape, stride=sharded.stride()
        )
    if shards == 1:
        return dequantize_state(codes, scales, signed)
    parts = zip(codes.chunk(shards), scales.chunk(shards), strict=False)  # the last ranks may hold nothing
    return torch.cat([dequantize_state(part, of_part, signed) for part, of_part in parts])
