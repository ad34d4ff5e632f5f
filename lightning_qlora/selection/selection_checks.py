"""What a conversion refuses after it chose the layers: patterns that match nothing, and adapters of other libraries."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_qlora.checks import KEEP_DENSE, TRAIN_IN_FULL
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import last_part, outer_names
from lightning_qlora.selection.patterns import Patterns
from lightning_qlora.selection.selection import REFUSE, Selection
from lightning_qlora.survey.survey import Kind, Survey

FOREIGN = {"lora_a", "lora_b"}  # in lower case: loralib, LitGPT, PEFT and torchtune
ARGUMENTS = ("modules_to_save", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


def refuse_foreign_adapters(seen: Survey, config: QLoRAConfig, choice: Selection) -> None:
    for part in seen.parts:
        name = part.names.full
        if part.stack is not None or not has_foreign_adapter(part.owner):
            continue
        is_excluded = Patterns(config.exclude_modules).match_outer(part.names.for_patterns)
        if not is_excluded and choice.train.keys().isdisjoint(outer_names(name)):
            raise ValueError(
                f"{name or 'the module itself'}: is a {part.class_name} with an adapter of another library. "
                "Conversion adds adapters of its own: pass the model before get_peft_model, or merge them into it "
                "first (PEFT: merge_and_unload()); adapter=FOLDER starts from a saved PEFT adapter. To keep them "
                f"frozen, {KEEP_DENSE}."
            )


def has_foreign_adapter(module: nn.Module) -> bool:
    names = (*module._parameters.keys(), *module._modules.keys())  # ScriptModules need keys()
    return not isinstance(module, LoRALayer) and {name.lower() for name in names} >= FOREIGN


def check_patterns(seen: Survey, config: QLoRAConfig, choice: Selection) -> None:
    """Raise ValueError if a pattern matches nothing in a whole module, or what can't be converted."""
    for row in choice.rows.values():
        if row.action == REFUSE:
            raise ValueError(
                f"target_modules={config.target_modules!r} names {row.name!r}, a {type(row.owner).__name__}: "
                f"{row.reason}. To train it, {TRAIN_IN_FULL}."
            )
    layers = {*choice.convert, *(part.names.full for part in seen.parts if part.kind is Kind.CONVERTED)}
    linear = {part.names.full for part in seen.parts if part.stack is not None or is_linear(part.owner)}
    every = {name for name, module in seen.modules if name and next(module.parameters(), None) is not None}
    fitting = {"modules_to_save": every, "rank_pattern": layers, "alpha_pattern": layers}
    for argument in ARGUMENTS:
        value = config.named_targets if argument == "target_modules" else getattr(config, argument)
        for text, names in _matches(seen, argument, value).items() if value else ():
            if not names or ("_pattern" in argument and layers.isdisjoint(names)):
                endings = sorted({last_part(name) for name in fitting.get(argument, linear)})
                raise ValueError(
                    f"{argument}={getattr(config, argument)!r}: no module of this model fits {text!r}. What it can "
                    f"name ends in {endings}. A list has such endings, a string is a regular expression for a name."
                )


def _matches(seen: Survey, argument: str, value: Any) -> dict[str, list[str]]:
    """Each pattern -> names of the parts that it matches, of exclude_modules also by the modules around them."""
    patterns = Patterns(value)
    matches: dict[str, list[str]] = {text: [] for text in patterns.texts}
    for part in seen.parts:
        if part.stack is not None and argument == "modules_to_save":
            continue
        names: Iterable[str] = part.names.for_patterns
        if argument == "exclude_modules":
            names = [outer for name in names for outer in outer_names(name) if outer or not name]
        for text in {text for name in names for text in patterns.of_name(name)}:
            matches[text].append(part.names.full)
    return matches
