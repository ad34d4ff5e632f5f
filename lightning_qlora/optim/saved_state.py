"""What a state dict of an optimizer has for each parameter, and how an optimizer of torch loads it."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_qlora.optim.state_8bit import to_32bit
from lightning_qlora.tensors.dtensor import shard_like


def saved_parameters(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> Iterator[tuple[Any, Tensor, Any]]:
    """Yield each index in a state dict, its parameter, and its betas: None for an optimizer without them.

    Parameters are matched by their order, as in torch.
    """
    saved = ((index, group.get("betas")) for group in state_dict["param_groups"] for index in group["params"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for (index, betas), param in zip(saved, params, strict=False):  # torch checks the lengths, with a better message
        yield index, param, betas


def states_for_torch(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> Iterator[tuple[Any, Tensor, Any]]:
    """Yield each index in a state dict, its parameter, and its state as an optimizer of torch can use it."""
    for index, param, betas in saved_parameters(optimizer, state_dict):
        state = state_dict["state"].get(index)
        if isinstance(state, dict):
            state = to_32bit(state, betas)
            yield index, param, state


def split_like(param: Tensor, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Whole state, with the tensors of the shape of its parameter split as that is."""
    state = dict(state)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == param.shape:
            state[key] = shard_like(value, param)
    return state


def load_whole_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load a state dict that was saved whole, or put together from shards: each tensor is split as its parameter is."""
    state = dict(saved["state"])
    if not getattr(optimizer, "splits_state", False):  # as PagedAdamW8bit does
        for index, param, values in states_for_torch(optimizer, saved):
            state[index] = split_like(param, values)
    optimizer.load_state_dict({**saved, "state": state})
