"""`wrap_once`, the function that every file named patches.py wraps with.

Code and objects of other libraries are changed in files named patches.py only. One function makes one change; its
docstring has the upstream file, the reason, the supported ways that were tried, and what would remove it.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.utils.checkpoint

from lightning_qlora.layers.disable_adapter import as_called


def wrap_once(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Replace the function or property `owner.name` by `replacement(original, *args)`; a second call does nothing."""
    held = inspect.getattr_static(owner, name)
    original: Any = held.fget if isinstance(held, property) else held
    mark = f"_qlora_{replacement.__name__}"
    if hasattr(original, mark):
        return

    @wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    setattr(wrapper, mark, True)
    setattr(owner, name, property(wrapper) if isinstance(held, property) else wrapper)


def recompute_as_called() -> None:
    """Let torch's activation checkpointing recompute a block with or without adapters, as it was called.

    Upstream: torch/utils/checkpoint.py restores random generators and autocast for the recomputation, and knows nothing
    of `disable_adapter`: a forward pass inside of it would be recomputed with adapters, and one before it without them
    if the backward pass runs inside.
    Supported ways tried: the argument `context_fn` of `checkpoint`, which is the caller's (transformers, the user).
    Removed by: upstream restoring context variables in the recomputation.
    """

    def function(original: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        return original(as_called(function), *args, **kwargs)

    def function_of(original: Any, ctx: Any, function: Any, *args: Any) -> Any:
        return original(ctx, as_called(function), *args)

    wrap_once(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", function)
    wrap_once(torch.utils.checkpoint.CheckpointFunction, "forward", function_of)
