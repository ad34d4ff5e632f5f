"""A change to the user's modules: a method of one of them, where torch has no hook that does the same."""

from collections.abc import Callable
from typing import Any

from torch import nn


def replace_method(module: nn.Module, name: str, method: Callable[..., Any] | None) -> None:
    """Replace a method of one module, such as its `forward`; None: that of its class is used again.

    Upstream: torch/nn/modules/module.py, Module.__call__ and Module._apply: the code that calls a method of a module
    has to call ours.
    Supported ways tried: forward hooks that enter and leave autocast, which fail under torch.compile, and can't run a
    forward pass a second time; a class derived from that of the module, which code that compares `type(module)`, keeps
    a registry of its classes or changes a class later does not see; `checkpoint_wrapper`, which renames parameters.
    Removed by: a context that a module runs its forward pass in.
    """
    if method is None:
        vars(module).pop(name, None)
    else:
        vars(module)[name] = method
