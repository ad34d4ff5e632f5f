"""Gradient checkpointing: recompute the repeated blocks of a model in the backward pass instead of keeping activations.

The forward method of each block runs in `torch.utils.checkpoint` while autograd records. transformers checkpoints its
layers only in training mode, and Lightning keeps these models in eval mode, so their layers are blocks like all others.
With a budget (`activation_budget.py`) a block keeps its activations where they fit.
"""

import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lightning_qlora.activations import patches
from lightning_qlora.activations.activation_budget import budget_for
from lightning_qlora.activations.recomputed import OfRecomputation, recomputed
from lightning_qlora.dtypes.instance_method import add, instance_method, remove
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.tensors.dtensor import is_sharded
from lightning_qlora.texts import group

FUNCTION = "_gradient_checkpointing_func"  # attribute of layers of transformers: what recomputes them


class RecomputedForward(OfRecomputation):
    """The forward method of a block, recomputed in the backward pass; hooks of the block run once, outside of it.

    Attributes:
        ran: Whether it was called while autograd recorded.
        budget: What decides for each call whether it is recomputed; None: it is.
    """

    ran = False
    budget: Any = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        if not self.ran:
            self.ran = True
        budget = self.budget
        if budget is not None and not torch.compiler.is_compiling():  # a graph is compiled for one way
            budget.is_shared = budget.is_shared or is_shared(self.module)
            return budget.call(self.module, self.original, args, kwargs)
        return recomputed(self.original, args, kwargs)

    def add_to_report(self, report: Any, name: str) -> None:
        report.activations = self.budget


def is_shared(block: nn.Module) -> bool:
    if not dist.is_initialized():
        return False
    return "_is_fsdp_managed_module" in vars(block) or any(map(is_sharded, block.parameters()))


def enable_gradient_checkpointing(module: nn.Module, setting: bool | int | str = True, is_shared: bool = False) -> None:
    """Recompute the repeated blocks of a converted module in its backward pass.

    `setting`: as `gradient_checkpointing` of QLoRAConfig. `is_shared`: whether a strategy will split them over ranks.

    Blocks are the layers that a transformers model checkpoints itself (of nested ones the innermost), and elsewhere the
    outermost ModuleList or Sequential with two or more children of one class that hold converted layers.
    """
    disable_gradient_checkpointing(module.modules())  # that of a conversion before
    layers = list(transformers_checkpointing_layers(module))
    inside = {id(part) for layer in layers for part in layer.modules()}
    left_out = set(_left_out(layers))
    blocks = [layer for layer in layers if not any(transformers_checkpointing_layers(*layer.children()))]
    blocks = [block for block in blocks if block not in left_out]
    blocks += [block for block in _repeated_blocks(module) if id(block) not in inside]
    _cache_only_without_gradients(module)
    if setting is True and any(map(_offloads, layers)):
        setting = "offload"
    budget: Any = None
    if setting is not True:
        budget = budget_for(setting, is_shared)
    names = {part: name for name, part in module.named_modules()}
    for layer in layers:
        patches.leave_recomputation_to_us(layer, True)
    for block in blocks:
        method = RecomputedForward(block)
        method.budget = budget
        add(method)
        if budget is not None:
            budget.add(block, names[block])
    if not blocks:
        warnings.warn(
            f"gradient_checkpointing={setting!r}: {type(module).__name__} has no repeated blocks (two or more modules "
            "of one class in an nn.ModuleList or nn.Sequential), so nothing is recomputed and no memory is saved.",
            stacklevel=2,
        )


def disable_gradient_checkpointing(modules: Iterable[nn.Module]) -> None:
    for part in modules:
        remove(part, OfRecomputation)
        if _is_transformers_layer(part):
            patches.leave_recomputation_to_us(part, False)
        for key, hook in [*vars(part).get("_forward_pre_hooks", {}).items()]:
            if isinstance(hook, partial) and hook.func is _omit_cache:
                del part._forward_pre_hooks[key]
                part._forward_pre_hooks_with_kwargs.pop(key, None)


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


def _left_out(layers: list[Any]) -> list[nn.Module]:
    """Layers that `every_n_layers` of transformers leaves out: one call gave them and layers that are on a function."""
    on = [layer for layer in layers if layer.gradient_checkpointing]
    functions = [function for layer in on if (function := vars(layer).get(FUNCTION)) is not None]
    inside = {part for layer in on for part in layer.modules()}
    return [layer for layer in layers if layer not in inside and vars(layer).get(FUNCTION) in functions]


def _offloads(layer: Any) -> bool:
    """Whether transformers was told to move inputs to the host: its `checkpoint` runs in `save_on_cpu` then."""
    function = getattr(getattr(layer, FUNCTION, None), "func", None)
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    return bool(layer.gradient_checkpointing) and "save_on_cpu" in names


def blocks_not_recomputed(module: nn.Module, layers: Iterable[nn.Module]) -> list[str]:
    """Names of the blocks that hold one of these layers, where no block of the group ran with gradients."""
    ids = {id(layer) for layer in layers}
    groups: dict[str, dict[str, RecomputedForward]] = {}
    for name, block in module.named_modules():
        method = instance_method(block, RecomputedForward)
        if method is not None and any(id(part) in ids for part in block.modules()):
            groups.setdefault(group(name), {})[name] = method
    idle = (methods for methods in groups.values() if not any(method.ran for method in methods.values()))
    return [name for methods in idle for name in methods]


def _cache_only_without_gradients(module: nn.Module) -> None:
    """Let transformers models run without the cache of keys and values while autograd records.

    A recomputed layer would write to the cache twice, and transformers omits it only in training mode.
    """
    for model in module.modules():
        if hasattr(model, "gradient_checkpointing_enable"):
            parameters = list(inspect.signature(model.forward).parameters)
            if "use_cache" in parameters:
                hook = partial(_omit_cache, parameters.index("use_cache"))
                model.register_forward_pre_hook(hook, with_kwargs=True)


def _omit_cache(position: int, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    if torch.is_grad_enabled() and len(args) <= position:
        return args, {**kwargs, "use_cache": False}
    return None


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
