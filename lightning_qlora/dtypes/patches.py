"""Changes to the user's modules and to transformers, where there is no hook that does the same."""

import sys
from collections.abc import Callable
from functools import partial
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


def replace_attention(attend: Callable[..., Any]) -> None:
    """Let models of transformers compute their "sdpa" attention by `attend(original, module, ...)`, once.

    A function that the user registered as "sdpa" stays.

    Upstream: transformers/modeling_utils.py: `AttentionInterface.register` is the supported way to add a function, in
    which the modules of a model look up the name in their config at each call.
    Supported ways tried: a name of our own in the config: transformers compares the name with "sdpa" to make masks.
    Removed by: fused attention in torch that multiplies fp32 tensors in fp16 without overflow.
    """
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    original = modeling.ALL_ATTENTION_FUNCTIONS["sdpa"]
    if original is modeling.sdpa_attention_forward:
        modeling.AttentionInterface.register("sdpa", partial(attend, original))
