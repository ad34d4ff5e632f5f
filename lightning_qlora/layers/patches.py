"""`replaces` and `make_changes`, by which files named patches.py change functions of other libraries.

Code and objects of other libraries are changed in these files only. One function makes one change; its docstring has
the upstream file, the reason, the supported ways that were tried, and what would remove it.
"""

import inspect
from collections.abc import Callable
from functools import reduce, wraps
from typing import Any, TypeVar

import torch.utils.checkpoint

from lightning_qlora.layers.disable_adapter import as_called
from lightning_qlora.lightning_copies import modules

Function = TypeVar("Function", bound=Callable[..., Any])
CHANGES: list[Any] = []  # module, name of a function in it, and what takes its place


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


def replaces(*places: str) -> Callable[[Function], Function]:
    """Decorate what takes the place of functions and properties of other packages; it gets the original one first.

    A place is "module:function" or "module:Class.method". `make_changes` puts the change there.
    """

    def register(replacement: Function) -> Function:
        CHANGES.extend((*place.split(":"), replacement) for place in places)
        return replacement

    return register


def make_changes(*packages: str) -> None:
    """Make the changes to these packages, once: to lightning also in its copies, to transformers if loaded."""
    for module, name, replacement in CHANGES:
        *owners, last = name.split(".")
        for found in modules(module) if module.partition(".")[0] in packages else ():
            wrap_once(reduce(getattr, owners, found), last, replacement)


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
