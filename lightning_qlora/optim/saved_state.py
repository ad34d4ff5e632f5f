"""What a state dict of an optimizer has for each parameter, and how a sharded run loads it."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_qlora.tensors.dtensor import shard_like


def saved_states(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> Iterator[tuple[Any, Tensor, dict[Any, Any]]]:
    """Yield each index in a state dict, its parameter (matched by the order, as in torch), and its state."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, param in zip(saved, params, strict=False):  # torch checks the lengths, with a better message
        state = state_dict["state"].get(index)
        if isinstance(state, dict):
            yield index, param, state


def load_whole_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load a state dict that was saved whole, or put together from shards: each tensor is split as its parameter is."""
    states = dict(saved["state"])
    for index, param, state in saved_states(optimizer, saved):
        states[index] = {
            key: shard_like(value, param) if isinstance(value, Tensor) and value.shape == param.shape else value
            for key, value in state.items()
        }
    optimizer.load_state_dict({**saved, "state": states})
