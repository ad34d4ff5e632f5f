"""Gradient checkpointing: recompute the repeated blocks of a model in the backward pass instead of keeping activations.

Transformers models have a mechanism of their own, which also switches off the cache of keys and values; any other
module gets its repeated blocks wrapped with `torch.utils.checkpoint`.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_qlora.linear import QLoRALinear, adapted_layers


def enable_checkpointing(module: nn.Module) -> int:
    """Recompute the repeated blocks of a converted module in its backward pass; the number of blocks.

    Blocks are the layers that a transformers model checkpoints itself, and elsewhere the outermost ModuleList or
    Sequential with two or more children of one class that hold converted layers.
    """
    layers = list(transformers_layers(module))
    for layer in layers:
        layer.gradient_checkpointing = True  # type: ignore[assignment]
        layer._gradient_checkpointing_func = _InItsOwnMode(layer)  # type: ignore[assignment]
    inside = {id(part) for layer in layers for part in layer.modules()}
    blocks = [block for block in _repeated_blocks(module) if id(block) not in inside]
    for block in blocks:
        block.forward = partial(_recomputed, block)
    if not layers and not blocks:
        warnings.warn(
            f"gradient_checkpointing=True: {type(module).__name__} has no repeated blocks (two or more modules of one "
            "class in an nn.ModuleList or nn.Sequential), so nothing is recomputed and no memory is saved.",
            stacklevel=2,
        )
    return len(layers) + len(blocks)


def transformers_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers inside a module that transformers recomputes while their `training` is true."""
    layers: Any = sys.modules.get("transformers.modeling_layers")
    if layers is not None:
        yield from (layer for layer in module.modules() if isinstance(layer, layers.GradientCheckpointingLayer))


class _InItsOwnMode:
    """What a transformers layer calls to recompute itself.

    Lightning leaves these models in eval mode, where their layers recompute nothing; the plugin sets `training` on the
    layers alone. What the layer itself drops out (OPT, BART) must stay as it would be without recomputation, so while
    it runs it has the mode of the modules inside it.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return checkpoint(partial(self._run, function), *args, use_reentrant=False)

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        inside = (part for part in self.layer.modules() if part is not self.layer and not isinstance(part, QLoRALinear))
        outside_mode, part = self.layer.training, next(inside, self.layer)
        self.layer.training = part.training
        try:
            return function(*args)
        finally:
            self.layer.training = outside_mode


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward pass of a block, its activations recomputed in the backward pass; hooks run once, outside of it."""
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Children of one class, two or more, in the outermost containers; a lone layer is not worth recomputing."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        blocks = [child for child in module if _is_block(child)]
        classes = Counter(type(block) for block in blocks)
        repeated = [block for block in blocks if classes[type(block)] > 1]
        if repeated:
            yield from repeated
            return
    for child in module.children():
        yield from _repeated_blocks(child)


def _is_block(child: nn.Module) -> bool:
    return not isinstance(child, QLoRALinear) and bool(adapted_layers(child))
