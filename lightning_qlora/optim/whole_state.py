"""Optimizer state that was saved whole (in one file, or put together from shards), for parameters that are sharded."""

from itertools import chain
from typing import Any

from torch.optim import Optimizer

from lightning_qlora.optim.adamw import PagedAdamW8bit
from lightning_qlora.optim.state_8bit import split_like, to_32bit


def load_whole_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load a state dict, each tensor split as its parameter is; parameters are matched by their order, as in torch."""
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    state = dict(saved["state"])
    if not isinstance(optimizer, PagedAdamW8bit):  # it splits its state itself
        for index, param in zip(ids, own, strict=False):  # torch checks the lengths, with a better message
            if index in state:
                state[index] = split_like(param, to_32bit(state[index]))
    optimizer.load_state_dict({**saved, "state": state})
