"""What a checkpoint holds beside the module's state: torch's random generators, and hyperparameters without networks.

Lightning pickles the networks among the hyperparameters (`save_hyperparameters()` with `net` as an argument), so a
checkpoint would hold the base a second time. `LeftOut` takes the place of a network that has parameters of the
converted module.
"""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from lightning_qlora.survey.records import conversion_of
from lightning_qlora.tensors.dtensor import of_all_ranks, world_size


def torch_rng_states(gathered: bool) -> list[dict[str, Any]]:
    """State of torch's generators on every rank, in rank order; all ranks must call it, as for saving a checkpoint.

    Not `gathered`: that of this rank alone, for a save after an error, which other ranks may not reach.
    """
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # else a CPU run would take memory of a GPU
        state["cuda"] = torch.cuda.get_rng_state()
    return of_all_ranks(state) if gathered else [state]


def set_torch_rng_state_of_rank(states: list[dict[str, Any]]) -> None:
    """Restore torch's generators on this rank; states that were saved with another world size are ignored."""
    if len(states) != world_size():
        return
    rank = 0
    if len(states) > 1:
        rank = dist.get_rank()
    state = states[rank]
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def begin_epoch_of_checkpoint(states: list[dict[str, Any]], begin: Callable[[], None], loop: Any, fetcher: Any) -> None:
    """Begin the epoch that a run resumes in (`begin`) with the generators as they were saved.

    The iterators of loaders draw from them: those of a new epoch after the save, so they are made again here, unless
    `begin` makes them. Those of the first epoch, and of one that goes on, were made before the save.
    """
    iterator = fetcher.iterator
    set_torch_rng_state_of_rank(states)
    begin()
    is_new = loop.trainer.current_epoch > 0 and not loop.batch_progress.current.ready
    if is_new and fetcher.iterator is iterator:
        iter(fetcher)


class LeftOut(nn.Module):
    """A network that a checkpoint does not hold; `kind` is the name of its class."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __reduce__(self) -> Any:
        return LeftOut, (self.kind,)

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse what the network had, with the way to load the checkpoint."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"{name!r} of a {vars(self).get('kind')}: this network was a hyperparameter, and the checkpoint of a "
            "converted module does not hold it. Load it with the network: "
            "lightning_qlora.load_from_checkpoint(MODULE_CLASS, PATH, net=...)."
        )


torch.serialization.add_safe_globals([LeftOut])  # so that `torch.load` with weights_only=True accepts the file


def leave_out_networks(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Replace the networks among a checkpoint's hyperparameters that share parameters with a converted module."""
    if conversion_of(module) is None:
        return
    converted = {id(parameter) for parameter in module.parameters()}

    def left_out(value: Any) -> Any:
        if isinstance(value, nn.Module) and not converted.isdisjoint(map(id, value.parameters())):
            return LeftOut(type(value).__name__)
        return value

    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint[key] = tree_map(left_out, checkpoint[key])


def check_networks(hyperparameters: Any, given: Mapping[str, Any]) -> None:
    """ValueError for a network that was left out of a checkpoint's hyperparameters and is not given."""
    if not isinstance(hyperparameters, dict):
        return
    for key, value in hyperparameters.items():
        if isinstance(value, LeftOut) and key not in given:
            raise ValueError(
                f"the hyperparameter {key!r} was a {value.kind}, and checkpoints of a converted module do not hold "
                f"networks among the hyperparameters. Pass {key}=..., as for training."
            )
