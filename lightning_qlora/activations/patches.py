"""Changes to layers of transformers that recompute themselves, and to modules that are examined."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def leave_recomputation_to_us(block: nn.Module, ours: bool) -> None:
    """Let a layer of transformers not recompute itself, where this package does so around it, and let it do so again.

    None says that it was on; if `gradient_checkpointing_disable` was called since, it stays off.
    Upstream: transformers/modeling_layers.py, GradientCheckpointingLayer.__call__, recomputes in training mode alone.
    Supported ways tried: `gradient_checkpointing_disable` of the model, which a part of a model does not have.
    Removed by: transformers recomputing in eval mode, in which Lightning keeps its models.
    """
    value: Any = getattr(block, "gradient_checkpointing", False)
    if ours and value:
        block.gradient_checkpointing = None  # type: ignore[assignment]
    elif not ours and value is None:
        block.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def examined(
    module: nn.Module, stand_ins: Mapping[Any, Callable[..., Any]], has_data: bool
) -> Iterator[list[nn.Module]]:
    """Let a module compute in eval mode, with stand-ins for some of its modules; then it is as it was.

    Modules with buffers are in training mode, in which BatchNorm mixes rows. Without data all values are 1.
    The list, filled at the end, has the modules whose attributes or buffers changed meanwhile.

    Upstream: torch/nn/modules/module.py, Module.__call__, which takes no other modules to compute with.
    Supported ways tried: a copy of the module, which needs its memory; `torch.func.functional_call`, which replaces
    tensors alone.
    Removed by: a call of a module with other modules in it.
    """
    changed: list[nn.Module] = []
    attributes = [(part, dict(vars(part))) for part in module.modules()]
    for part, _ in attributes:
        own = vars(part)
        own["training"] = bool(part._buffers)
        own["_buffers"] = {key: _value(buffer, has_data) for key, buffer in part._buffers.items()}
        if not has_data:
            parameters = {key: value for key, value in part._parameters.items() if value is not None}
            ones = {key: nn.Parameter(_value(value, False), value.requires_grad) for key, value in parameters.items()}
            own["_parameters"] = {**part._parameters, **ones}
        if part in stand_ins:
            own["forward"] = stand_ins[part]
    during = [dict(vars(part)) for part, _ in attributes]
    buffers = [dict(part._buffers) for part, _ in attributes]
    try:
        yield changed
    finally:
        for (part, before), own, own_buffers in zip(attributes, during, buffers, strict=True):
            is_same = _same(vars(part), own) and _same(part._buffers, own_buffers)
            if not is_same or any(buffer._version for buffer in own_buffers.values() if buffer is not None):
                changed.append(part)
            vars(part).clear()
            vars(part).update(before)


def _value(tensor: Any, has_data: bool) -> Any:
    if tensor is None:
        return None
    if has_data:
        return tensor.clone()
    return torch.ones((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)


def _same(values: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return values.keys() == others.keys() and all(values[key] is others[key] for key in values)
