"""What is recomputed in the backward pass: a call, and the methods of modules that stand for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_qlora.dtypes.instance_method import OfTraining

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # attributes of a module


class OfRecomputation(OfTraining):
    """A method that `gradient_checkpointing` puts in place of another one."""


def recomputed(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The output of a call that is recomputed; `checkpoint` has keywords of its own, which a forward may have too."""
    return checkpoint(partial(forward, **kwargs) if kwargs else forward, *args, use_reentrant=False)


def is_in_backward_pass() -> bool:
    is_in_graph_task: bool = torch._C._current_graph_task_id() != -1
    return is_in_graph_task


def saved_tensor_hooks() -> Any:
    """The pair of saved-tensor hooks that is on; None without one."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


@contextmanager
def watch_saved_tensors(notice: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `notice` with each tensor that a graph saves; the hooks that are on, as those of `checkpoint`, keep it.

    Without hooks a detached tensor is kept: an output, kept by its own graph, would not be freed without a backward
    pass.
    """
    pack, unpack = saved_tensor_hooks() or (torch.detach, torch.detach)

    def noticed(tensor: Tensor) -> Any:
        notice(tensor)
        return pack(tensor)

    with saved_tensors_hooks(noticed, unpack):
        yield
