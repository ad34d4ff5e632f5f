"""Gradient checkpointing: recompute the repeated blocks of a model in the backward pass instead of keeping activations.

The forward method of each block runs in `torch.utils.checkpoint` while autograd records. transformers checkpoints its
layers only in training mode, and Lightning keeps these models in eval mode, so their layers are blocks like all others.
With a budget (`activation_budget.py`) a block keeps its activations where they fit.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_qlora.activations.activation_budget import ActivationBudget
from lightning_qlora.activations.recomputed import OfRecomputation, recomputed
from lightning_qlora.activations.token_tiles import let_run_in_tiles
from lightning_qlora.checks import memory_limit
from lightning_qlora.dtypes.instance_method import add, instance_method, remove
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.tensors.dtensor import is_sharded


class RecomputedForward(OfRecomputation):
    """The forward method of a block, recomputed in the backward pass; hooks of the block run once, outside of it.

    Attributes:
        budget: What decides for each call whether it is recomputed; None: it is.
    """

    budget: ActivationBudget | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        if (caches := sys.modules.get("transformers.cache_utils")) is not None:  # else they would be written twice
            args = tuple(None if isinstance(value, caches.Cache) else value for value in args)
            kwargs = {key: None if isinstance(value, caches.Cache) else value for key, value in kwargs.items()}
            kwargs |= {"use_cache": False} if kwargs.get("use_cache") else {}
        if self.budget is None or torch.compiler.is_compiling():  # a graph is compiled for one way
            return recomputed(self.original, args, kwargs)
        if any(map(is_sharded, self.module.parameters())) or "_is_fsdp_managed_module" in vars(self.module):
            self.budget.recomputes_all = True
        return self.budget.call(self.module, self.original, args, kwargs)

    def add_to_report(self, report: Any, name: str) -> None:
        report.activations = self.budget


def enable_gradient_checkpointing(module: nn.Module, setting: bool | int | str = True, is_shared: bool = False) -> None:
    """Recompute the repeated blocks of a converted module in its backward pass.

    `setting`: as `gradient_checkpointing` of QLoRAConfig. `is_shared`: whether a strategy will split them over ranks.

    Blocks are the layers that a transformers model checkpoints itself (of nested ones the innermost), and elsewhere the
    outermost ModuleList or Sequential with two or more children of one class that hold converted layers.
    """
    disable_gradient_checkpointing(module.modules())  # that of a conversion before
    layers: list[Any] = list(transformers_checkpointing_layers(module))
    inside = {id(part) for layer in layers for part in layer.modules()}
    blocks = [layer for layer in layers if not any(transformers_checkpointing_layers(*layer.children()))]
    blocks += [block for block in _repeated_blocks(module) if id(block) not in inside]
    budget = None
    if setting is not True:
        limit = None if setting in ("auto", "offload") else memory_limit(setting)
        budget = ActivationBudget(limit, is_shared or setting == "offload")
    for layer in layers:
        layer.gradient_checkpointing = False  # of transformers: it would recompute what we recompute
    for block in blocks:
        method = RecomputedForward(block)
        method.budget = budget
        add(method)
        if budget is not None:
            let_run_in_tiles(block)
    if not blocks:
        warnings.warn(
            f"gradient_checkpointing={setting!r}: {type(module).__name__} has no repeated blocks (two or more modules "
            "of one class in an nn.ModuleList or nn.Sequential), so nothing is recomputed and no memory is saved.",
            stacklevel=2,
        )


def disable_gradient_checkpointing(modules: Iterable[nn.Module]) -> None:
    for part in modules:
        remove(part, OfRecomputation)


def budget_of(parts: Iterable[nn.Module]) -> Any:
    """What decides which blocks of a module with these parts are recomputed; None: all are, or none."""
    methods = (instance_method(part, RecomputedForward) for part in parts)
    return next((method.budget for method in methods if method is not None), None)


def transformers_checkpointing_layers(*modules: nn.Module) -> Iterator[nn.Module]:
    for module in modules:
        yield from filter(_is_transformers_layer, module.modules())


def _is_transformers_layer(part: nn.Module) -> bool:
    layers: Any = sys.modules.get("transformers.modeling_layers")
    return layers is not None and isinstance(part, layers.GradientCheckpointingLayer)


def _repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Two or more children of one class in the outermost containers; recomputing a single layer saves no memory."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        blocks = [child for child in _flat(module) if not isinstance(child, QLoRALinear) and adapted_layers(child)]
        classes = Counter(type(block) for block in blocks)
        repeated = [block for block in blocks if classes[type(block)] > 1]
        if repeated:
            yield from repeated
            return
    for child in module.children():
        yield from _repeated_blocks(child)


def _flat(container: nn.ModuleList | nn.Sequential) -> Iterator[nn.Module]:
    """The children; of an nn.ModuleList inside, its children, because nobody calls the list. It may hold None."""
    for child in container:
        if isinstance(child, nn.ModuleList):
            yield from _flat(child)
        elif child is not None:
            yield child
