"""The random generators: of all ranks, for a checkpoint that resumes exactly, and of this process."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def random_state() -> list[dict[str, Any]]:
    """State of torch's generators on every rank, in rank order; called on all ranks, as saving a checkpoint is."""
    mine: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    if world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def set_random_state(states: list[dict[str, Any]]) -> None:
    """Put this rank's generators back; states of another number of ranks fit nobody and are left aside."""
    if len(states) != world_size():
        return
    rank = dist.get_rank() if world_size() > 1 else 0
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if "cuda" in states[rank] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())


def generators() -> dict[str, Any]:
    """State of the global generators of torch, numpy and Python in this process."""
    return _collect_rng_states()


def set_generators(states: dict[str, Any]) -> None:
    """Put them back."""
    _set_rng_states(states)


def same_generators(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two states of them, those on a GPU aside, would draw the same numbers."""
    return (
        torch.equal(one["torch"], other["torch"])
        and one["python"] == other["python"]
        and all(np.array_equal(a, b) for a, b in zip(one["numpy"], other["numpy"], strict=True))
    )
