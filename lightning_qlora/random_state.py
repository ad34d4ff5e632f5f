"""The random generators of all ranks, for a checkpoint that resumes exactly."""

from typing import Any

import torch
import torch.distributed as dist


def random_state() -> list[dict[str, Any]]:
    """State of torch's generators on every rank, in rank order; called on all ranks, as saving a checkpoint is."""
    mine: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine["cuda"] = torch.cuda.get_rng_state()
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def set_random_state(states: list[dict[str, Any]]) -> None:
    """Put this rank's generators back; states of another number of ranks fit nobody and are left aside."""
    distributed = dist.is_available() and dist.is_initialized()
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
    if len(states) != world_size:
        return
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if "cuda" in states[rank] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())
