"""A change to layers of transformers that recompute themselves."""

from typing import Any

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
