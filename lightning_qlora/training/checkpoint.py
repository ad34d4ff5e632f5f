"""What a checkpoint holds beside the module's state: torch's random generators, and hyperparameters without networks.

Lightning pickles the networks among the hyperparameters (`save_hyperparameters()` with `net` as an argument), so a
checkpoint would hold the base a second time. `LeftOut` takes the place of a network that has parameters of the
converted module. It holds the structure of the network, without the values of parameters, if checkpoints hold the base
themselves (checkpoint="full").
"""

import base64
import io
import pickle
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from lightning_qlora.adapters.conversion import conversion_of
from lightning_qlora.layers.dtensor import of_all_ranks, world_size
from lightning_qlora.layers.packed_linear import BASE, PackedLayer


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


class LeftOut(nn.Module):
    """A network that a checkpoint does not hold.

    Attributes:
        kind: The name of its class.
        structure: The pickled network without the values of its parameters, in base64, since `torch.load` takes no
            bytes with weights_only=True; empty if checkpoints lack its base.
    """

    def __init__(self, kind: str, structure: str) -> None:
        super().__init__()
        self.kind, self.structure = kind, structure

    def __reduce__(self) -> Any:
        return LeftOut, (self.kind, self.structure)

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
    conversion = conversion_of(module)
    if conversion is None:
        return
    own, full = {id(parameter) for parameter in module.parameters()}, conversion.config.checkpoint == "full"

    def without(value: Any) -> Any:
        if not isinstance(value, nn.Module) or own.isdisjoint(map(id, value.parameters())):
            return value
        return LeftOut(type(value).__name__, _structure(value) if full else "")

    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint[key] = tree_map(without, checkpoint[key])


def networks_of(hyperparameters: Any, given: Mapping[str, Any], unpickle: bool) -> dict[str, nn.Module]:
    """The networks that were left out of a checkpoint's hyperparameters and are not given, without their values.

    Raises ValueError for one that is neither given nor in the checkpoint, or may not be unpickled.
    """
    held = hyperparameters.items() if isinstance(hyperparameters, dict) else ()
    missing = {key: value for key, value in held if isinstance(value, LeftOut) and key not in given}
    for key, value in missing.items():
        if not (value.structure and unpickle):
            others = ", or weights_only=False, which unpickles its structure" if value.structure else ""
            raise ValueError(
                f"the hyperparameter {key!r} was a {value.kind}, and checkpoints of a converted module do not hold "
                f"networks among the hyperparameters. Pass {key}=..., as for training{others}."
            )
    return {key: pickle.loads(base64.b64decode(value.structure)) for key, value in missing.items()}


class _WithoutValues(pickle.Pickler):
    """Pickles the parameters and 4-bit weights of a network without their values."""

    def __init__(self, stream: io.BytesIO, network: nn.Module) -> None:
        super().__init__(stream)
        layers = [part for part in network.modules() if isinstance(part, PackedLayer)]
        self._packed = {id(getattr(layer, name)) for layer in layers for name in BASE}

    def reducer_override(self, value: Any) -> Any:
        """See pickle.Pickler."""
        if isinstance(value, nn.Parameter):
            return _zeros, (tuple(value.shape), value.dtype, value.requires_grad)
        if id(value) in self._packed:
            return _zero_bytes, (tuple(value.shape),)
        return NotImplemented


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device="cpu"), requires_grad)


def _zero_bytes(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8, device="cpu")


def _structure(network: nn.Module) -> str:
    stream = io.BytesIO()
    _WithoutValues(stream, network).dump(network)
    return base64.b64encode(stream.getvalue()).decode()
