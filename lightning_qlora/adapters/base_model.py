"""The base model inside a LightningModule: PEFT and vLLM would load that one, so its names are used for adapters."""

import re
from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any

from lightning.fabric.wrappers import _FabricModule
from torch import nn

from lightning_qlora.adapters.base_compatibility import quantization_of_layer
from lightning_qlora.adapters.peft_experts import stacks_of
from lightning_qlora.config import QLoRAConfig, arguments_that
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import (
    is_transformers_model,
    last_part,
    name_endings,
    only_child_of,
    without_wrappers,
)
from lightning_qlora.layers.qlora_linear import adapted_layers, base_layers
from lightning_qlora.layers.records import own_parameters
from lightning_qlora.layers.trainable_tokens import DELTA, TokenAdapter, token_indices
from lightning_qlora.lightning_copies import classes


def find_base_model(module: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the base model: the transformers model that holds all adapters, if there is one.

    Else the only child with parameters of a LightningModule, else the module itself, whose name is "".
    """
    if isinstance(module, classes(_FabricModule)):
        module = module.module
    adapted = set(adapted_layers(module).values())
    for name, part in module.named_modules():
        if is_transformers_model(part) and adapted.issubset(part.modules()):
            return name, part
    name = only_child_of(module)
    if name is None:
        return "", module
    return name, module.get_submodule(name)


def describe_base(module: nn.Module, config: QLoRAConfig, trained: Iterable[str]) -> dict[str, Any]:
    """Entries of a checkpoint, beside `config`, from which a PEFT folder can be written without the module.

    `trained` are the names in `trained_modules` of the base model.
    """
    prefix, base = find_base_model(module)
    layers = base_layers(base, remove_duplicate=False)
    quantization = None
    if layers:
        quantization = quantization_of_layer(next(iter(layers.values())))
    description: dict[str, Any] = {
        "prefix": without_wrappers(prefix),
        "task_type": _task_type(base),
        "base_model": getattr(getattr(base, "config", None), "_name_or_path", None),
        "fan_in_fan_out": any(layer._transposed and not layer.is_stack for layer in layers.values()),
        "quantization": quantization,
        "target_modules": target_modules_of(base),
        "trained_in_full": list(trained),
        "layers": {},
    }
    stacks = stacks_of(base)
    if stacks:
        description["experts"] = {name: list(stack) for name, stack in stacks.items()}
    tokens = token_indices(base)
    if tokens:
        description["tokens"] = tokens
    for name, layer in layers.items():
        arguments = _arguments_of_layer(layer.config, config)
        if arguments:
            description["layers"][name] = arguments
    return description


def _arguments_of_layer(layer_config: QLoRAConfig, config: QLoRAConfig) -> dict[str, Any]:
    """The arguments of a layer that differ from those of the module."""
    names = [*arguments_that("of_layer")]
    if layer_config.changes_base or config.changes_base:
        names += ["init_lora_weights", "loftq_config"]
    values = {name: getattr(layer_config, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(config, name)}


def config_of_layer(description: Mapping[str, Any], name: str, config: QLoRAConfig) -> QLoRAConfig:
    """The arguments of a layer, by its name in the base model."""
    return config.with_own(description.get("layers", {}).get(name, {}))


def trained_modules(module: nn.Module, unchanged: Container[Any]) -> dict[str, nn.Module]:
    """Modules inside of one, by name, with a parameter that is no adapter and trains or has changed.

    `unchanged` are the frozen parameters that have not (`base_fingerprints`). A parameter that trained and was frozen
    again, and a resized embedding, have changed. A shared module has several names; the rows of a tied embedding have
    one, as in PEFT's files.
    """
    first_names = dict(module.named_modules())
    trained = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, LoRALayer) or (isinstance(part, TokenAdapter) and name not in first_names):
            continue
        for key, parameter in own_parameters(part).items():
            if parameter.is_floating_point() and (part, key) not in unchanged:
                trained[without_wrappers(name)] = part
    return trained


def tied_names(base: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several; rows of embeddings that train are excluded, as PEFT ties them."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if not name.endswith(DELTA):
            names.setdefault(id(parameter), []).append(without_wrappers(name))
    return [group for group in names.values() if len(group) > 1]


def _task_type(base: nn.Module) -> str | None:
    """PEFT's task type of a base model; None if it has none, or one whose class would add modules."""
    name = type(base).__name__
    has_encoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    if name.endswith("ForConditionalGeneration") and has_encoder:
        return "SEQ_2_SEQ_LM"
    # Multimodal models without an encoder are "ForConditionalGeneration" too.
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "CAUSAL_LM"
    return None


def target_modules_of(base: nn.Module, without: Collection[str] = ()) -> str | list[str]:
    """PEFT's target_modules for exactly the converted linear layers: last names, full names, or an expression."""
    modules = [without_wrappers(name) for name, _ in base.named_modules()]
    names = [name for name, layer in base_layers(base).items() if not layer.is_stack]
    layers = [name for name in names if name not in without]
    for endings in ({last_part(name) for name in layers}, set(layers)):
        matches = {name for name in modules if not endings.isdisjoint(name_endings(name))}
        if matches == set(layers):
            return sorted(endings)
    return "|".join(re.escape(name) for name in layers)
