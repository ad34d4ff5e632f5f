"""A change to layers of transformers that recompute themselves."""

from torch import nn


def leave_recomputation_to_us(block: nn.Module) -> None:
    """Let a layer of transformers not recompute itself, where this package does so around it.

    Upstream: transformers/modeling_layers.py, GradientCheckpointingLayer.__call__, recomputes in training mode alone.
    Supported ways tried: `gradient_checkpointing_disable` of the model, which a part of a model does not have.
    Removed by: transformers recomputing in eval mode, in which Lightning keeps its models.
    """
    if getattr(block, "gradient_checkpointing", False):
        block.gradient_checkpointing = False  # type: ignore[assignment]
