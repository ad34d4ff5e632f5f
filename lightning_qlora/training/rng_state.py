"""Random generators: of every rank, for a checkpoint that resumes exactly, and of this process."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states

from lightning_qlora.layers.dtensor import of_all_ranks, world_size

# The global generators of torch, numpy and Python in this process.
collect_rng_states, set_rng_states = _collect_rng_states, _set_rng_states


def gather_torch_rng_states() -> list[dict[str, Any]]:
    """State of torch's generators on every rank, in rank order; all ranks must call it, as for saving a checkpoint."""
    own: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # else a CPU run would take memory of a GPU
        own["cuda"] = torch.cuda.get_rng_state()
    return of_all_ranks(own)


def set_torch_rng_state_of_rank(states: list[dict[str, Any]]) -> None:
    """Restore torch's generators on this rank; states that were saved with another world size are ignored."""
    if len(states) != world_size():
        return
    rank = dist.get_rank() if world_size() > 1 else 0
    torch.set_rng_state(states[rank]["cpu"].cpu())
    if "cuda" in states[rank] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"].cpu())


def is_rng_state_of_process(states: dict[str, Any]) -> bool:
    """Whether the generators of this process, except those of a GPU, have these states."""
    now = collect_rng_states()
    return (
        torch.equal(now["torch"], states["torch"])
        and now["python"] == states["python"]
        and all(np.array_equal(a, b) for a, b in zip(now["numpy"], states["numpy"], strict=True))
    )
