"""A change to models without data."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from lightning_qlora.experts.routed_experts import is_routed, routed_forward


def run_without_data(fake_model: nn.Module) -> None:
    """Replace functions that can't run in a model whose tensors have no data.

    Upstream: torch/nn/modules/module.py, Module._apply, which the forward pass of some routers calls (`.to`): it can't
    swap tensors without data. transformers/integrations/moe.py, whose grouped products of experts run on such tensors
    in bf16 only; our loop over experts needs the same memory.
    Removed by: upstream running both under FakeTensorMode.
    """
    for part in fake_model.modules():
        part._apply = partial(_replace_parameters, part)  # type: ignore[method-assign]
        if is_routed(type(part)):
            part.forward = partial(routed_forward, part)


def _replace_parameters(part: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    if recurse:
        for child in part.children():
            child._apply(fn)  # type: ignore[no-untyped-call]
    for key, parameter in part._parameters.items():
        if parameter is not None:
            part._parameters[key] = nn.Parameter(fn(parameter), requires_grad=parameter.requires_grad)
    return part
