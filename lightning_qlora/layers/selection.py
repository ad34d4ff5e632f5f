"""Which layers of a module become 4-bit layers, which stay dense, and why.

The first line that fits decides on a layer:

    in modules_to_save                                   trains in full
    in trainable_token_indices, or tied to such a layer  frozen but for these rows
    seen by an earlier conversion                        stays as it is
    in exclude_modules                                   skipped: dense and frozen
    new (`new_parameters`), and not in target_modules    trains in full
    not in target_modules                                skipped
    a frozen copy of a layer that is converted           4 bits, and its adapter is frozen too (`frozen_copies`)
    can't be converted, or only if named                 skipped (`dense_reasons`: tied, frozen by the module, routers)
    not larger than its adapter, with "all-linear"       trains in full
    any other linear layer                               4 bits and an adapter
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_qlora.config import QLoRAConfig, fits
from lightning_qlora.layers.dense_reasons import FROZEN, LOADED, ModuleFacts, name_clash, too_small
from lightning_qlora.layers.dotted_names import expert_name, join, last_part, plain_name
from lightning_qlora.layers.expert_selection import ExpertParameter, expert_parameters
from lightning_qlora.layers.experts import experts_of
from lightning_qlora.layers.foreign_adapters import foreign_adapter
from lightning_qlora.layers.frozen_copies import originals
from lightning_qlora.layers.kinds import is_linear, weight_shape
from lightning_qlora.layers.names import LayerNames, inside, matches, matches_outer, names_of_modules
from lightning_qlora.layers.new_parameters import new_parameters
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.layers.records import is_recorded
from lightning_qlora.layers.token_selection import check_tokens, select_tokens
from lightning_qlora.layers.trainable_tokens import TrainableTokens

IN_MODULES_TO_SAVE = "in modules_to_save"
NOT_SAVED = "not in 4 bits in the checkpoint"
SavedLayers = Mapping[str, Mapping[str, Any]]  # full name of a layer in a checkpoint -> its own arguments


class ToConvert(NamedTuple):
    """A layer to convert, the arguments with its own rank and lora_alpha, and the name that seeds its adapter."""

    layer: nn.Module
    config: QLoRAConfig
    seed_name: str


class StackToConvert(NamedTuple):
    """The same for the experts of one parameter."""

    parameter: ExpertParameter
    config: QLoRAConfig
    seed_name: str


@dataclass
class Selection:
    """What conversion does with each layer.

    Attributes:
        convert: Name -> layer that becomes a QLoRALinear.
        stacks: Name -> parameter that becomes QLoRAExperts.
        train: Name -> why a module, or a parameter of a module with others inside, trains in full.
        skip: Name -> why a linear layer, or a parameter of experts, stays dense and frozen.
        stop: Names of modules and parameters that trained before, are no linear layers, and are frozen.
        tokens: Name of a layer of which some rows train -> their indices.
        refused: Name -> why a layer that target_modules names can't be converted.
        copies: Names of the layers in `convert` whose adapter is frozen, because the module froze the layer.
        names: Id of each module -> its names.
    """

    convert: dict[str, ToConvert] = field(default_factory=dict)
    stacks: dict[str, StackToConvert] = field(default_factory=dict)
    train: dict[str, str] = field(default_factory=dict)
    skip: dict[str, str] = field(default_factory=dict)
    stop: dict[str, None] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    copies: set[str] = field(default_factory=set)
    names: dict[int, LayerNames] = field(default_factory=dict)


def select_layers(module: nn.Module, config: QLoRAConfig, saved: SavedLayers | None = None) -> Selection:
    """`select_in_part` for a whole module. With `saved` exactly these layers are chosen, those of a checkpoint.

    Raises:
        ValueError: If a pattern matches no module, or one that can't be converted; names the argument and the pattern.
            If a part of the module has adapters of another library.
    """
    choice = select_in_part(module, config, saved)
    if saved is None:
        _check_patterns(module, config, choice)
    check_tokens(module, config.trainable_token_indices, choice.names, choice.train)
    _check_no_adapters(module, config, choice)
    return choice


def select_in_part(module: nn.Module, config: QLoRAConfig, saved: SavedLayers | None = None) -> Selection:
    """Decide for every linear layer of a module, to which patterns for other modules may be given as well.

    A layer that was quantized while its model loaded counts as the dense layer that it was. What an earlier conversion
    has seen stays as it is.
    """
    choice, facts = Selection(names=names_of_modules(module)), ModuleFacts(module)
    everything, layers = config.target_modules == "all-linear", dict(module.named_modules())
    new = new_parameters(module)
    experts = experts_of(module)

    def named(layer: nn.Module, patterns: str | list[str]) -> bool:
        return any(matches(form, patterns) for form in choice.names[id(layer)].forms)

    in_full = [name for name, layer in layers.items() if named(layer, config.modules_to_save or [])]
    choice.train.update(dict.fromkeys(in_full, IN_MODULES_TO_SAVE))
    choice.tokens = select_tokens(module, config.trainable_token_indices, choice.names)
    scripted: list[str] = []
    for name, layer in layers.items():
        if any(inside(name, outer) for outer in (*in_full, *scripted)):
            continue
        if isinstance(layer, torch.jit.ScriptModule):
            scripted.append(name)
            choice.skip[name] = "a torch.jit.ScriptModule, which can't be changed"
            continue
        if name in choice.tokens or isinstance(layer, TrainableTokens):
            continue
        if is_recorded(layer):
            if is_linear(layer) and not isinstance(layer, QLoRALinear):
                kept = choice.train if any(p.requires_grad for p in layer.parameters()) else choice.skip
                kept[name] = "as an earlier conversion left it"
            continue
        if stacks := expert_parameters(layer):
            for stack in stacks:
                _select_stack(choice, name, stack, config, facts, saved)
            continue
        target = not everything and bool(name) and named(layer, config.target_modules)
        forms, seed_name = choice.names[id(layer)]
        own = {key: new[id(p)] for key, p in layer._parameters.items() if id(p) in new}
        is_new = bool(own) and not layer._modules
        if layer._modules and not _is_excluded(forms, config):
            choice.train.update({join(name, key): reason for key, reason in own.items()})
        if _is_converted(layer) or not (is_linear(layer) or target or is_new):
            continue
        if layer in experts:  # selected with the module that held the parameter
            continue
        of_layer = config.for_layer(forms)
        if saved is not None and plain_name(name) in saved:
            choice.convert[name] = ToConvert(layer, of_layer.with_own(saved[plain_name(name)]), seed_name)
            if everything and facts.is_frozen(layer):
                choice.copies.add(name)
        elif _is_excluded(forms, config):
            choice.skip[name] = "in exclude_modules"
        elif is_new and not target:
            choice.train[name] = next(iter(own.values()))
        elif not everything and not target:
            choice.skip[name] = "not in target_modules"
        elif not is_linear(layer):
            choice.refused[name] = "only linear layers can be converted"
        elif clash := name_clash(layer):
            (choice.skip if everything else choice.refused)[name] = clash
        elif reason := facts.cannot_convert(layer) or (
            facts.not_by_default(name, layer, of_layer) if everything else None
        ):
            choice.skip[name] = reason
        elif everything and (small := too_small(weight_shape(layer), of_layer)):
            (choice.train if facts.trains else choice.skip)[name] = small
        elif 0 in weight_shape(layer):
            choice.skip[name] = "its {}x{} weight is empty".format(*weight_shape(layer))
        elif saved is not None:
            choice.skip[name] = NOT_SAVED
        else:
            choice.convert[name] = ToConvert(layer, of_layer, seed_name)
    if saved is None and config.initialization != "calibrated":  # which depends on the inputs of each
        frozen = [name for name, reason in choice.skip.items() if reason == FROZEN and name in layers]
        for name, original in originals(frozen, choice.convert, layers).items():
            choice.convert[name] = choice.convert[original]._replace(layer=layers[name])
            choice.copies.add(name)
            del choice.skip[name]
    return choice


def _select_stack(
    choice: Selection, owner_name: str, stack: ExpertParameter, config: QLoRAConfig, facts: ModuleFacts,
    saved: SavedLayers | None,
) -> None:  # fmt: skip
    """Decide for a parameter of experts. Patterns match its name, or that of the module that holds it."""
    names = choice.names[id(stack.owner)]
    name, forms = join(owner_name, stack.key), _forms_of_stack(names, stack)
    of_stack = config.for_layer(forms)
    everything = config.target_modules == "all-linear"
    reason = facts.cannot_quantize(stack.owner._parameters[stack.key]) if stack.loaded is None else None
    seed_name, first = join(names.seed_name, stack.key), plain_name(expert_name(name, 0))
    if saved is not None and first in saved:
        choice.stacks[name] = StackToConvert(stack, of_stack.with_own(saved[first]), seed_name)
    elif _is_excluded(forms, config):
        choice.skip[name] = "in exclude_modules"
    elif not everything and not any(matches(form, config.target_modules) for form in forms):
        choice.skip[name] = "not in target_modules"
    elif everything and facts.is_frozen(stack.owner if stack.loaded is None else stack.loaded.layers[0], stack.key):
        choice.skip[name] = FROZEN
    elif reason or (reason := too_small(stack.shape, of_stack) if everything else None):
        choice.skip[name] = reason
    elif saved is not None:
        choice.skip[name] = NOT_SAVED
    elif 0 not in stack.shape:
        choice.stacks[name] = StackToConvert(stack, of_stack, seed_name)


def _forms_of_stack(names: LayerNames, stack: ExpertParameter) -> list[str]:
    return [join(form, stack.key) for form in names.forms] + names.forms


def _check_patterns(module: nn.Module, config: QLoRAConfig, choice: Selection) -> None:
    layers = dict(module.named_modules())
    for name, reason in choice.refused.items():
        raise ValueError(
            f"target_modules={config.target_modules!r} names {name!r}, a {type(layers[name]).__name__}: {reason}. "
            "Name it in modules_to_save to train it in full."
        )
    dense = choice.train | choice.skip
    forms = {name: choice.names[id(layer)].forms for name, layer in layers.items()}
    for name, layer in layers.items():
        for stack in expert_parameters(layer):
            forms[join(name, stack.key)] = _forms_of_stack(choice.names[id(layer)], stack)
    for argument, pattern, match in _patterns(config):
        matched = [name for name in (layers if argument == "modules_to_save" else forms) if match(forms[name])]
        if argument.endswith("_pattern"):
            converted = [*choice.convert, *choice.stacks]
            converted += [name for name, layer in layers.items() if _is_converted(layer)]
            if not set(matched) & set(converted):
                reasons = "".join(f" {name}: {dense[name]}." for name in [n for n in matched if n in dense][:3])
                raise ValueError(f"{argument}: {pattern!r} fits none of the layers to convert: {converted}.{reasons}")
        elif not matched:
            convertible = [name for name in forms if name not in layers or is_linear(layers[name])]
            endings = sorted({last_part(name) for name in convertible})
            raise ValueError(
                f"{argument}={getattr(config, argument)!r}: no module of this model fits {pattern!r}. "
                f"Its linear layers end in {endings}.{_meant(config, argument, pattern, endings)}"
            )


def _meant(config: QLoRAConfig, argument: str, pattern: str, endings: list[str]) -> str:
    """What a pattern that fits no layer was meant to be, if that is clear; else an empty string."""
    if argument == "target_modules" and pattern.replace("_", "-") in ("all-linear", "all"):
        return " Use target_modules='all-linear' for all linear layers."
    parts = [part.strip() for part in pattern.split(",")]
    if isinstance(getattr(config, argument), str) and set(parts) <= set(endings):
        return f" A string is a regular expression for the full name. Use {argument}={parts} for endings."
    return ""


def _check_no_adapters(module: nn.Module, config: QLoRAConfig, choice: Selection) -> None:
    for name, part in module.named_modules():
        kind, forms = foreign_adapter(part), choice.names[id(part)].forms
        if kind and not _is_excluded(forms, config) and not any(inside(name, outer) for outer in choice.train):
            raise ValueError(
                f"{name or 'the module itself'}: is {kind}. Conversion adds adapters of its own, and freezes or "
                "quantizes these. Convert the model without them: pass it before get_peft_model or merge them into it "
                "first (PEFT: merge_and_unload()); adapter=FOLDER starts from a saved PEFT adapter. To keep them "
                "frozen, name this module in exclude_modules."
            )


def check_names_in_loaded_models(module: nn.Module, config: QLoRAConfig, choice: Selection) -> None:
    """Raise ValueError for patterns that fit a layer of a model quantized while loading, but not by its name there."""
    for model in [part for part in module.modules() if LOADED in vars(part)]:
        in_model = names_of_modules(model)
        for name, layer in model.named_modules():
            for argument, pattern, match in _patterns(config):
                if (not is_linear(layer) and argument != "modules_to_save") or match(in_model[id(layer)].forms):
                    continue
                if full := next((form for form in choice.names[id(layer)].forms if match([form])), None):
                    raise ValueError(
                        f"{argument}: {pattern!r} matches {full!r}, the name in the {type(module).__name__}, and not "
                        f"{name!r}, the name in the {type(model).__name__}. That model was quantized while it loaded, "
                        "so patterns must match the names in it: leave out the attribute that holds it."
                    )


def _patterns(config: QLoRAConfig) -> Iterator[tuple[str, str, Callable[[list[str]], bool]]]:
    """Argument, pattern, and a function that says whether one of a module's names matches it."""
    for argument in ("modules_to_save", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = getattr(config, argument)
        if value != "all-linear":
            for pattern in [value] if isinstance(value, str) else value:
                yield argument, pattern, partial(_any_matches, argument, value, pattern)


def _any_matches(argument: str, value: str | list[str] | dict[str, Any], pattern: str, forms: list[str]) -> bool:
    if isinstance(value, dict):
        return any(fits(form, pattern) for form in forms)
    match = matches_outer if argument == "exclude_modules" else matches
    return any(match(form, value if isinstance(value, str) else [pattern]) for form in forms)


def _is_excluded(forms: list[str], config: QLoRAConfig) -> bool:
    return any(matches_outer(form, config.exclude_modules or []) for form in forms)


def _is_converted(layer: nn.Module) -> bool:
    return isinstance(layer, QLoRALinear) and not layer.loaded
