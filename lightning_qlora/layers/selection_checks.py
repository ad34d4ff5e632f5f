"""What a conversion refuses after it chose the layers: patterns that match nothing, and adapters of other libraries."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lightning_qlora.checks import first_of
from lightning_qlora.config import QLoRAConfig, fits
from lightning_qlora.layers.expert_selection import expert_parameters
from lightning_qlora.layers.kinds import is_linear, kind_of
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import inside, join, last_part, matches, matches_outer, names_of_modules
from lightning_qlora.layers.provenance import LOADED
from lightning_qlora.layers.selection import REFUSE, SKIP, TRAIN, WARN, Selection, names_of_stack
from lightning_qlora.layers.token_selection import check_tokens

# Parameters or modules of a layer with an adapter, by their names in lower case.
FOREIGN = (
    ("lora_a", "lora_b"),  # loralib, LitGPT, PEFT and torchtune
    ("lora_down", "lora_up"),  # kohya-ss
    ("adapter_wte", "gating_factor"),  # LLaMA-Adapter in LitGPT
    ("adapter_bias", "adapter_scale"),  # its second version
)


class Pattern(NamedTuple):
    """One pattern of an argument."""

    argument: str
    text: str
    matches_name: Callable[[str], bool]

    def match(self, names: Iterable[str]) -> bool:
        """Whether one of a module's names matches."""
        return any(self.matches_name(name) for name in names)


def patterns_of(config: QLoRAConfig) -> Iterator[Pattern]:
    """The patterns of all arguments for layers."""
    for argument in ("modules_to_save", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = getattr(config, argument)
        if argument == "target_modules":
            value = config.named_targets
        match = matches_outer if argument == "exclude_modules" else matches
        if isinstance(value, str):
            yield Pattern(argument, value, partial(match, patterns=value))
            continue
        for text in value:
            if isinstance(value, dict):
                yield Pattern(argument, text, partial(fits, pattern=text))
            else:
                yield Pattern(argument, text, partial(match, patterns=[text]))


def check_selection(module: nn.Module, config: QLoRAConfig, choice: Selection, of_checkpoint: bool) -> None:
    """Check the layers of a whole module; those of a checkpoint were chosen without patterns.

    Raises:
        ValueError: If a pattern matches no module, or one that can't be converted; names the argument and the pattern.
            If a part of the module has adapters of another library.
    """
    if not of_checkpoint:
        _check_patterns(module, config, choice)
    check_tokens(module, config.trainable_token_indices, choice.names, choice.train)
    for name, part in module.named_modules():
        kind = foreign_adapter(part)
        if kind is None or choice.names[id(part)].match_outer(config.exclude_modules):
            continue
        if not any(inside(name, outer) for outer in choice.train):
            raise ValueError(
                f"{name or 'the module itself'}: is {kind}. Conversion adds adapters of its own, and freezes or "
                "quantizes these. Convert the model without them: pass it before get_peft_model or merge them into it "
                "first (PEFT: merge_and_unload()); adapter=FOLDER starts from a saved PEFT adapter. To keep them "
                "frozen, name this module in exclude_modules."
            )


def _check_patterns(module: nn.Module, config: QLoRAConfig, choice: Selection) -> None:
    layers = dict(module.named_modules())
    for name, reason in choice.reasons(REFUSE).items():
        raise ValueError(
            f"target_modules={config.target_modules!r} names {name!r}, a {type(layers[name]).__name__}: {reason}. "
            "Name it in modules_to_save to train it in full."
        )
    names_of = {name: choice.names[id(layer)].all for name, layer in layers.items()}
    for name, layer in layers.items():
        for stack in expert_parameters(layer):
            names_of[join(name, stack.key)] = names_of_stack(choice.names[id(layer)], stack).all
    earlier = [name for name, layer in layers.items() if isinstance(layer, LoRALayer) and not layer.loaded]
    converted = [*choice.convert, *earlier]
    dense = choice.reasons(TRAIN, SKIP, WARN)
    for pattern in patterns_of(config):
        names = layers if pattern.argument == "modules_to_save" else names_of
        matched = [name for name in names if pattern.match(names_of[name])]
        if pattern.argument in ("rank_pattern", "alpha_pattern"):
            if not set(matched) & set(converted):
                reasons = "".join(f" {name}: {dense[name]}." for name in [n for n in matched if n in dense][:3])
                first = first_of(map(repr, converted), 3)
                raise ValueError(
                    f"{pattern.argument}: {pattern.text!r} fits none of the layers to convert: [{first}].{reasons}"
                )
        elif not matched:
            _refuse_pattern(pattern, getattr(config, pattern.argument), layers, names_of)


def _refuse_pattern(pattern: Pattern, value: Any, layers: Mapping[str, nn.Module], names: Iterable[str]) -> NoReturn:
    """Raise ValueError for a pattern that fits no module, with the name endings that there are."""
    if pattern.argument == "modules_to_save":
        parts = "modules"
        rule = "A list has names or such endings."
        fitting = [name for name, layer in layers.items() if name and next(layer.parameters(), None) is not None]
    else:
        parts = "linear layers"
        rule = "A list has such endings, a string is a regular expression for the full name."
        fitting = [name for name in names if name not in layers or is_linear(layers[name])]
    if pattern.argument == "target_modules":
        rule += " 'all-linear', alone or in a list, means all linear layers."
    endings = sorted({last_part(name) for name in fitting})
    raise ValueError(
        f"{pattern.argument}={value!r}: no module of this model fits {pattern.text!r}. Its {parts} end in {endings}. "
        f"{rule}"
    )


def check_names_in_loaded_models(module: nn.Module, config: QLoRAConfig, choice: Selection) -> None:
    """Raise ValueError for patterns that fit a layer of a model quantized while loading, but not by its name there."""
    for model in [part for part in module.modules() if LOADED in vars(part)]:
        names_in_model = names_of_modules(model)
        for name, layer in model.named_modules():
            for pattern in patterns_of(config):
                if not is_linear(layer) and pattern.argument != "modules_to_save":
                    continue
                if pattern.match(names_in_model[id(layer)].all):
                    continue
                matched = next((each for each in choice.names[id(layer)].all if pattern.match([each])), None)
                if matched is not None:
                    raise ValueError(
                        f"{pattern.argument}: {pattern.text!r} matches {matched!r}, the name in the "
                        f"{type(module).__name__}, and not {name!r}, the name in the {type(model).__name__}. That "
                        "model was quantized while it loaded, so patterns must match the names in it: leave out the "
                        "attribute that holds it."
                    )


def foreign_adapter(module: nn.Module) -> str | None:
    """What a module is, if it is an adapter of another library; None if it is none."""
    kind = f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
    for part, file, base in (("layer", "tuners.tuners_utils", "BaseTunerLayer"), ("model", "peft_model", "PeftModel")):
        peft = sys.modules.get(f"peft.{file}")
        if peft is not None and isinstance(module, getattr(peft, base)):
            return f"{kind}, a {part} with a PEFT adapter"
    # ScriptModules need keys()
    names = {name.lower() for name in (*module._parameters.keys(), *module._modules.keys())}
    if not isinstance(module, LoRALayer) and any(names.issuperset(pair) for pair in FOREIGN):
        return f"{kind}, a layer that contains another library's adapter"
    return None


def hand_written_adapters(root: nn.Module) -> list[str]:
    """Names of the frozen linear layers with two trainable low-rank matrices beside them, [r, in] and [out, r].

    Their shapes tell, transposed or not. They are in the module that holds the layer, or in the layer itself.
    """
    names = []
    for name, module in root.named_modules():
        if isinstance(module, (LoRALayer, torch.jit.ScriptModule)):
            continue
        frozen = {key: layer for key, layer in [("", module), *module.named_children()] if _is_frozen_linear(layer)}
        if not frozen:
            continue
        matrices = [p for p in module.parameters() if p.requires_grad and p.ndim == 2]
        for key, layer in frozen.items():
            in_layer = set()
            if key:
                in_layer = {id(parameter) for parameter in layer.parameters()}
            beside = [parameter for parameter in matrices if id(parameter) not in in_layer]
            if len(beside) == 2 and _is_low_rank(layer, *beside):
                names.append(join(name, key))
    return names


def _is_frozen_linear(layer: nn.Module) -> bool:
    if not is_linear(layer):
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and not weight.requires_grad


def _is_low_rank(layer: Any, first: Tensor, second: Tensor) -> bool:
    """Whether two matrices can be A and B of a linear layer."""
    outputs, inputs = (getattr(layer, size) for size in kind_of(type(layer)).sizes)
    shapes = {tuple(sorted(first.shape)), tuple(sorted(second.shape))}
    return any(
        rank < min(inputs, outputs) and shapes == {tuple(sorted((rank, inputs))), tuple(sorted((rank, outputs)))}
        for rank in first.shape
    )
