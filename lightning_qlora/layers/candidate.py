"""Candidate: a layer, or a stack of experts, that the rules of `selection.py` decide about, and what they ask of it."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.expert_selection import Routers
from lightning_qlora.layers.experts import ExpertParameter
from lightning_qlora.layers.kinds import is_linear, is_packed
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import LayerNames, join, without_wrappers
from lightning_qlora.layers.provenance import LOADED, OUTPUT_EMBEDDINGS, get_output_embeddings, transformers_models
from lightning_qlora.layers.qlora_linear import MEMBERS
from lightning_qlora.quantization.blockwise import FLOATS

ROUTERS = ("gate", "router")
FROZEN = "frozen by the module"
LARGE_RANK = "an adapter of rank"  # beginning of a reason
FEWEST = 64  # weights, one block of the default size: 4 bits would save nothing
SavedLayers = Mapping[str, Mapping[str, Any]]  # name of a layer in a checkpoint -> its own arguments


class Context:
    """What a decision depends on beside the layer: the whole module, the arguments, the checkpoint to load."""

    def __init__(self, module: nn.Module, config: QLoRAConfig, saved: SavedLayers | None) -> None:
        self.config = config
        self.saved = saved
        self.modules = dict(module.named_modules())
        self.routers = Routers(self.modules)
        owners: dict[int, dict[nn.Module, str]] = defaultdict(dict)
        for name, layer in self.modules.items():
            for key, parameter in layer._parameters.items():
                if parameter is not None:
                    owners[id(parameter)][layer] = join(name, key)
        # Id of a tied parameter -> the modules that hold it, with its name in each.
        self.shared = {key: layers for key, layers in owners.items() if len(layers) > 1}
        self.trains = any(parameter.requires_grad for parameter in module.parameters())
        # bitsandbytes freezes what it quantizes, so there the rest of a model decides whether the user froze it.
        self.frozen_models: set[int] = set()
        for model in transformers_models(module):
            if not any(parameter.requires_grad for parameter in model.parameters()):
                self.frozen_models |= {id(layer) for layer in model.modules()}
        self.output_embeddings = {id(layer) for layer in get_output_embeddings(module)}
        self.left_dense: set[int] = set()
        for model in module.modules():
            if getattr(model, "is_loaded_in_4bit", False) or vars(model).get(LOADED):
                dense = (part for part in model.modules() if not (is_packed(part) or isinstance(part, LoRALayer)))
                self.left_dense |= {id(part) for part in dense}


@dataclass
class Candidate:
    """A layer, or a stack of experts. Methods that give a reason give None where it does not apply."""

    name: str
    part: nn.Module | ExpertParameter
    names: LayerNames  # those that patterns may match
    new: str | None  # why its values are new, if they are
    context: Context

    @cached_property
    def is_named(self) -> bool:
        """Whether target_modules names it; a pattern for any name does not mean the whole module."""
        return bool(self.name) and self.names.match(self.context.config.named_targets)

    @property
    def is_linear(self) -> bool:
        """Whether it has a weight that 4 bits could replace."""
        return isinstance(self.part, ExpertParameter) or is_linear(self.part)

    @property
    def saved_arguments(self) -> Mapping[str, Any] | None:
        """Its own arguments in the checkpoint; None if it is not there in 4 bits."""
        return (self.context.saved or {}).get(without_wrappers(self.name))

    @property
    def can_train(self) -> bool:
        """Whether it may train in full: conversion makes nothing train in a module that the user froze."""
        return self.context.trains and not isinstance(self.part, ExpertParameter)

    @cached_property
    def config(self) -> QLoRAConfig:
        """The arguments with its own rank and lora_alpha."""
        return self.context.config.for_layer(self.names.all).with_own(self.saved_arguments or {})

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of its weight as it is stored; of one in 4 bits, and of an expert, [out, in]."""
        if isinstance(self.part, ExpertParameter):
            return self.part.shape
        weight: Any = self.part.weight
        if is_packed(self.part):
            weight = weight.quant_state
        rows, columns = weight.shape
        return rows, columns

    @property
    def _place(self) -> tuple[nn.Module, str]:
        """The module that holds its weight, and the key; in 4 bits an adapter is there in place of the weight."""
        owner: Any = self.part
        key = "weight"
        if isinstance(owner, ExpertParameter):
            key = owner.key
            owner = owner.loaded if owner.loaded is not None else owner.owner
        return owner, "lora_A" if isinstance(owner, LoRALayer) else key

    @property
    def is_frozen(self) -> bool:
        """Whether the module froze its weight, while something else trains."""
        owner, key = self._place
        if is_packed(owner):
            return self.context.trains and id(owner) in self.context.frozen_models
        weight: Any = owner._parameters[key]
        return self.context.trains and not weight.requires_grad

    def name_clash(self) -> str | None:
        """Why a subclass of nn.Linear can't become a QLoRALinear."""
        layer = self.part
        if not isinstance(layer, nn.Linear) or isinstance(layer, LoRALayer) or is_packed(layer):
            return None
        # torch's own classes are nn.Linear's, and parametrized or sharded layers, which other checks refuse
        kinds = [kind for kind in type(layer).__mro__ if not kind.__module__.startswith("torch.")]
        names = {name for kind in kinds for name in vars(kind)}
        if "__call__" in names:
            return f"{type(layer).__name__} has a __call__ of its own, which may compute something else"
        names |= {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules} - {"weight"}
        clash = min(names & MEMBERS, default=None)
        return clash and f"{type(layer).__name__} has a {clash} of its own, which a 4-bit layer would replace"

    def cannot_convert(self) -> str | None:
        """Why it can't be converted, even if target_modules names it."""
        owner, key = self._place
        if isinstance(owner, LoRALayer):
            return None
        if owner is self.part:
            for computed in ("weight", "bias"):
                if computed not in owner._parameters:
                    return f"its {computed} is computed (parametrized), not stored"
        weight: Any = owner._parameters[key]
        if weight.dtype not in FLOATS and not is_packed(owner):
            reason = f"its weight is {str(weight.dtype).removeprefix('torch.')}"
            if "float8" in reason:
                reason += "; load the model in configure_model or plugin.init(), where it is dequantized"
            return reason
        others = [name for holder, name in self.context.shared.get(id(weight), {}).items() if holder is not owner]
        return f"its weight is tied to {others[0]}" if others else None

    def not_by_default(self) -> str | None:
        """Why it is converted only if target_modules names it."""
        layer, modules = self.part, self.context.modules
        if isinstance(layer, nn.Module):
            outer, _, last = self.name.rpartition(".")
            if id(layer) in self.context.output_embeddings or last in OUTPUT_EMBEDDINGS:
                return "output embedding; name it in target_modules to convert it"
            if (last in ROUTERS and hasattr(modules[outer], "experts")) or self.context.routers.has(self.name, layer):
                return "router of experts; name it in target_modules to convert it"
        if self.is_frozen:
            return FROZEN
        if id(layer) in self.context.left_dense and not self.too_small():
            return "dense in a model that was loaded in 4 bits; name it in target_modules to convert it"
        return None

    def too_small(self) -> str | None:
        """Why 4 bits and an adapter would not be smaller."""
        rows, columns = self.shape
        if rows * columns <= FEWEST:
            return f"its {rows}x{columns} weights are too few for 4 bits"
        if self.config.r * (rows + columns) < rows * columns:
            return None
        return f"{LARGE_RANK} {self.config.r} would not be smaller than its {rows}x{columns} weights"

    def is_empty(self) -> str | None:
        """Why there is nothing to quantize."""
        rows, columns = self.shape
        return None if rows and columns else f"its {rows}x{columns} weight is empty"
