"""Which layers of a module become 4-bit layers, which stay dense, and why.

The first line that fits decides on a layer:

    in modules_to_save                                   trains in full
    in trainable_token_indices, or tied to such a layer  frozen but for these rows
    seen by an earlier conversion                        stays as it is
    in exclude_modules                                   skipped: dense and frozen
    new (`new_parameters`), and not in target_modules    trains in full
    not in target_modules                                skipped
    can't be converted, or only if named                 skipped (`reasons`: tied, frozen by the module, routers)
    not larger than its adapter, with "all-linear"       trains in full
    any other linear layer                               4 bits and an adapter

In target_modules=["all-linear", "lm_head"] the layers that "lm_head" matches count as named.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lightning_qlora.config import QLoRAConfig, fits
from lightning_qlora.layers.expert_selection import ExpertParameter, expert_parameters
from lightning_qlora.layers.experts import QLoRAExperts, experts_of
from lightning_qlora.layers.foreign_adapters import foreign_adapter
from lightning_qlora.layers.kinds import is_linear, is_packed, pop_packed_weight
from lightning_qlora.layers.names import (
    LayerNames,
    expert_name,
    inside,
    join,
    last_part,
    matches,
    matches_outer,
    names_of_modules,
    plain_name,
)
from lightning_qlora.layers.qlora_linear import REPLACED, QLoRALinear
from lightning_qlora.layers.reasons import LOADED, ModuleFacts, name_clash, new_parameters, shape_of, too_small
from lightning_qlora.layers.records import is_recorded
from lightning_qlora.layers.trainable_tokens import TrainableTokens, check_tokens, select_tokens

IN_MODULES_TO_SAVE = "in modules_to_save"
NOT_SAVED = "not in 4 bits in the checkpoint"
SavedLayers = Mapping[str, Mapping[str, Any]]  # full name of a layer in a checkpoint -> its own arguments


class ToConvert(NamedTuple):
    """A layer to convert, or the experts of one parameter."""

    part: nn.Module | ExpertParameter
    config: QLoRAConfig  # the arguments, with its own rank and lora_alpha
    seed_name: str  # name from which the seed of its adapter is made

    def convert(
        self, name: str, device: torch.device | None = None, weights: Iterable[Tensor] | None = None
    ) -> dict[str, nn.Module]:
        """Convert it, in place: name -> 4-bit layer. For the other arguments see `QLoRAExperts.from_parameter`."""
        part, config, seed_name = self
        if isinstance(part, ExpertParameter):
            owner, key, count, transposed = part
            made = QLoRAExperts.from_parameter(owner, key, config, name, count, transposed, device, seed_name, weights)
            return {expert_name(name, number): layer for number, layer in enumerate(made.layers)}
        if is_packed(part):
            setattr(part.weight, REPLACED, part)  # for an optimizer that was created before conversion
            QLoRALinear.from_packed(part, *pop_packed_weight(part), config, name, seed_name)
        else:
            QLoRALinear.from_linear(part, config, name, device, seed_name)
        return {name: part}


@dataclass
class Selection:
    """What conversion does with each layer, by name."""

    convert: dict[str, ToConvert] = field(default_factory=dict)  # layers, and parameters with the weights of experts
    train: dict[str, str] = field(default_factory=dict)  # why a module or parameter trains in full
    skip: dict[str, str] = field(default_factory=dict)  # why a linear layer, or a stack of experts, is dense and frozen
    stop: dict[str, None] = field(default_factory=dict)  # what trained, is no linear layer, and conversion froze
    tokens: dict[str, list[int]] = field(default_factory=dict)  # indices of the rows that train
    refused: dict[str, str] = field(default_factory=dict)  # why a layer that target_modules names is an error
    named_in_vain: dict[str, str] = field(default_factory=dict)  # why a layer that target_modules names is in `skip`
    names: dict[int, LayerNames] = field(default_factory=dict)  # id of each module -> its names


def select_layers(module: nn.Module, config: QLoRAConfig, saved: SavedLayers | None = None) -> Selection:
    """`select_in_part` for a whole module, with errors for patterns. With `saved`, exactly the layers of a checkpoint.

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
    """Decide for every linear layer of a module. A pattern that matches nothing in it may be for another module.

    A layer that was quantized while its model loaded counts as the dense layer that it was. What an earlier conversion
    has seen stays as it is.
    """
    choice, facts = Selection(names=names_of_modules(module)), ModuleFacts(module)
    layers, new, experts = dict(module.named_modules()), new_parameters(module), experts_of(module)

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
        names = choice.names[id(layer)]
        if stacks := expert_parameters(layer):
            for stack in stacks:  # patterns match its name, or that of the module that holds it
                of_stack = LayerNames(_forms_of_stack(names, stack), join(names.seed_name, stack.key))
                _decide(choice, facts, config, saved, join(name, stack.key), stack, of_stack, None)
            continue
        new_here = {key: new[id(p)] for key, p in layer._parameters.items() if id(p) in new}
        if layer._modules and not _is_excluded(names.forms, config):
            choice.train.update({join(name, key): reason for key, reason in new_here.items()})
        reason = None if layer._modules else next(iter(new_here.values()), None)
        if not (_is_converted(layer) or layer in experts):  # experts: selected with the module that held the parameter
            _decide(choice, facts, config, saved, name, layer, names, reason)
    return choice


def _decide(
    choice: Selection, facts: ModuleFacts, config: QLoRAConfig, saved: SavedLayers | None, name: str,
    part: nn.Module | ExpertParameter, names: LayerNames, new: str | None,
) -> None:  # fmt: skip
    """Decide for one layer or stack of experts. `new`: why its values are new, if they are (`new_parameters`)."""
    forms, seed_name = names
    target = bool(name) and any(matches(form, config.named_targets) for form in forms)
    everything = config.all_linear and not target
    is_stack = isinstance(part, ExpertParameter)
    has_kind = isinstance(part, ExpertParameter) or is_linear(part)
    if not (has_kind or target or new):
        return
    own, saved_name = config.for_layer(forms), plain_name(expert_name(name, 0) if is_stack else name)
    if saved is not None and saved_name in saved:
        choice.convert[name] = ToConvert(part, own.with_own(saved[saved_name]), seed_name)
    elif _is_excluded(forms, config):
        choice.skip[name] = "in exclude_modules"
    elif new and not target:
        choice.train[name] = new
    elif not everything and not target:
        choice.skip[name] = "not in target_modules"
    elif not has_kind:
        choice.refused[name] = "only linear layers can be converted"
    elif clash := name_clash(part):
        (choice.skip if everything else choice.refused)[name] = clash
    elif reason := facts.cannot_convert(part):
        choice.skip[name] = reason
        if target:
            choice.named_in_vain[name] = reason
    elif everything and (reason := facts.not_by_default(name, part, own)):
        choice.skip[name] = reason
    elif everything and (small := too_small(shape_of(part), own)):
        (choice.train if facts.trains and not is_stack else choice.skip)[name] = small
    elif 0 in shape_of(part):
        choice.skip[name] = "its {}x{} weight is empty".format(*shape_of(part))
    elif saved is not None:
        choice.skip[name] = NOT_SAVED
    else:
        choice.convert[name] = ToConvert(part, own, seed_name)


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
            converted = [*choice.convert, *(name for name, layer in layers.items() if _is_converted(layer))]
            if not set(matched) & set(converted):
                reasons = "".join(f" {name}: {dense[name]}." for name in [n for n in matched if n in dense][:3])
                raise ValueError(f"{argument}: {pattern!r} fits none of the layers to convert: {converted}.{reasons}")
        elif not matched:
            _refuse_pattern(argument, getattr(config, argument), pattern, layers, forms)


def _refuse_pattern(
    argument: str, value: Any, pattern: str, layers: Mapping[str, nn.Module], forms: Iterable[str]
) -> NoReturn:
    """Raise ValueError for a pattern that fits no module, with the name endings that there are."""
    if argument == "modules_to_save":
        what, rule = "modules", "A list has names or such endings."
        names = [name for name, layer in layers.items() if name and next(layer.parameters(), None) is not None]
    else:
        what, rule = "linear layers", "A list has such endings, a string is a regular expression for the full name."
        names = [name for name in forms if name not in layers or is_linear(layers[name])]
    if argument == "target_modules":
        rule += " 'all-linear', alone or in a list, means all linear layers."
    endings = sorted({last_part(name) for name in names})
    raise ValueError(
        f"{argument}={value!r}: no module of this model fits {pattern!r}. Its {what} end in {endings}. {rule}"
    )


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
        value = config.named_targets if argument == "target_modules" else getattr(config, argument)
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
