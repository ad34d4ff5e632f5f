"""The base model inside a LightningModule (`Parts.base`): what checkpoints and adapter folders say of it."""

import re
from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any

from torch import nn

from lightning_qlora.config import QLoRAConfig, arguments_that
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import DELTA, last_part, name_endings, owner_name, without_wrappers
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.layers.with_adapter import WithAdapter
from lightning_qlora.peft.base_compatibility import Quantization
from lightning_qlora.peft.peft_layers import stacks_of, taken_for_experts
from lightning_qlora.survey.parts import Parts

OF_LAYER = arguments_that("of_layer")


def describe_base(parts: Parts, config: QLoRAConfig, trained: Iterable[str]) -> dict[str, Any]:
    """Entries of a checkpoint, beside `config`, from which a PEFT folder can be written without the module.

    `trained` are the names in `trained_modules` of the base model.
    """
    base = parts.base
    layers = {part.reported_name(name): part for name, part in base.places if isinstance(part, LoRALayer)}
    first = next(iter(layers.values()), None)
    linear = [layer for layer in layers.values() if isinstance(layer, QLoRALinear)]
    parameters = taken_for_experts(base)
    of_layers = {}
    for name, layer in layers.items():
        values = {key: getattr(layer.config, key) for key in OF_LAYER}
        arguments = {key: value for key, value in values.items() if value != getattr(config, key)}
        if arguments:
            of_layers[name] = arguments
    description: dict[str, Any] = {
        "prefix": without_wrappers(parts.base_name),
        "task_type": _task_type(base.root),
        "base_model": getattr(getattr(base.root, "config", None), "_name_or_path", None),
        "fan_in_fan_out": any(layer._transposed for layer in linear),
        "quantization": None if first is None else Quantization.of(first).entry(),
        "target_modules": target_modules_of(base, without=parameters),
        "trained_in_full": list(trained),
        "layers": of_layers,
    }
    if len(linear) < len(layers):
        description["experts"] = {name: list(stack) for name, stack in stacks_of(dict(base.named)).items()}
    if parameters:
        description["parameters"] = parameters
    if len(base.adapters) > len(base.layers):
        description["tokens"] = base.rows_that_train
    return description


def config_of_layer(description: Mapping[str, Any], name: str, config: QLoRAConfig) -> QLoRAConfig:
    return config.with_own(description.get("layers", {}).get(name, {}))


def trained_modules(parts: Parts, unchanged: Container[Any]) -> dict[str, nn.Module]:
    """Modules by name with a parameter that is no adapter and trains or has changed.

    `unchanged` are the frozen parameters that have not. A parameter that trained and was frozen again, and a resized
    embedding, have changed. A shared module has several names; the rows of a tied embedding have one, as in PEFT's
    files.
    """
    first_names = {name for name, _ in parts.named}
    trained = {}
    for name, part, key, parameter in parts.parameters:
        name = owner_name(name)
        if isinstance(part, WithAdapter) and not (part.row_count and name in first_names):
            continue
        if parameter.is_floating_point() and (part, key) not in unchanged:
            trained[without_wrappers(name)] = part
    return trained


def tied_names(base: Parts) -> list[list[str]]:
    """The names of each parameter that has several; rows of embeddings that train are excluded, as PEFT ties them."""
    names: dict[int, list[str]] = {}
    for name, _, _, parameter in base.parameters:
        if not name.endswith(DELTA):
            names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _task_type(base: nn.Module) -> str | None:
    """PEFT's task type of a base model; None if it has none, or one whose class would add modules or text inputs."""
    if getattr(base, "main_input_name", "input_ids") != "input_ids":
        return None
    name = type(base).__name__
    has_encoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    if name.endswith("ForConditionalGeneration") and has_encoder:
        return "SEQ_2_SEQ_LM"
    # Multimodal models without an encoder are "ForConditionalGeneration" too.
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        return "CAUSAL_LM"
    return None


def target_modules_of(base: Parts, without: Collection[str]) -> str | list[str]:
    """PEFT's target_modules for exactly the converted linear layers: last names, full names, or an expression."""
    modules = [name for name, _ in base.named]
    names = [name for name, layer in base.layers.items() if isinstance(layer, QLoRALinear)]
    layers = [name for name in names if name not in without]
    for endings in ({last_part(name) for name in layers}, set(layers)):
        matches = {name for name in modules if not endings.isdisjoint(name_endings(name))}
        if matches == set(layers):
            return sorted(endings)
    return "|".join(re.escape(name) for name in layers)
