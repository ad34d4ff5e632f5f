"""What a conversion refuses after it chose the layers: patterns that match nothing, and adapters of other libraries."""

import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

from lightning_qlora.checks import KEEP_DENSE, TRAIN_IN_FULL, first_of
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import last_part, outer_names
from lightning_qlora.selection.patterns import Patterns
from lightning_qlora.selection.selection import REFUSE, Selection
from lightning_qlora.survey.survey import Kind, Survey

# Parameters or modules of a layer with an adapter, by their names in lower case.
FOREIGN = (
    ("lora_a", "lora_b"),  # loralib, LitGPT, PEFT and torchtune
    ("lora_down", "lora_up"),  # kohya-ss
    ("adapter_wte", "gating_factor"),  # LLaMA-Adapter in LitGPT
    ("adapter_bias", "adapter_scale"),  # its second version
)
ARGUMENTS = ("modules_to_save", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


def refuse_foreign_adapters(seen: Survey, config: QLoRAConfig, choice: Selection) -> None:
    for part in seen.parts:
        name = part.names.full
        kind = None if part.stack is not None else foreign_adapter(part.owner)
        if kind is None or Patterns(config.exclude_modules).match_outer(part.names.for_patterns):
            continue
        if choice.train.keys().isdisjoint(outer_names(name)):
            raise ValueError(
                f"{name or 'the module itself'}: is {kind}. Conversion adds adapters of its own, and freezes or "
                "quantizes these. Convert the model without them: pass it before get_peft_model or merge them into it "
                "first (PEFT: merge_and_unload()); adapter=FOLDER starts from a saved PEFT adapter. To keep them "
                f"frozen, {KEEP_DENSE}."
            )


def check_patterns(seen: Survey, config: QLoRAConfig, choice: Selection) -> None:
    """Raise ValueError if a pattern matches nothing in a whole module, or what can't be converted."""
    for row in choice.rows.values():
        if row.action == REFUSE:
            raise ValueError(
                f"target_modules={config.target_modules!r} names {row.name!r}, a {type(row.owner).__name__}: "
                f"{row.reason}. To train it, {TRAIN_IN_FULL}."
            )
    patterns = {argument: getattr(config, argument) for argument in ARGUMENTS} | {
        "target_modules": config.named_targets
    }
    for argument, value in patterns.items():
        for text, names in _matches(seen, argument, value).items() if value else ():
            if argument in ("rank_pattern", "alpha_pattern"):
                earlier = [part.names.full for part in seen.parts if part.kind is Kind.CONVERTED]
                converted = dict.fromkeys([*choice.convert, *earlier])
                if converted.keys().isdisjoint(names):
                    dense = choice.train | choice.skip
                    reasons = "".join(f" {name}: {dense[name]}." for name in [n for n in names if n in dense][:3])
                    first = first_of(map(repr, converted), 3)
                    raise ValueError(f"{argument}: {text!r} fits none of the layers to convert: [{first}].{reasons}")
            elif not names:
                _refuse_pattern(argument, text, getattr(config, argument), seen)


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


def _refuse_pattern(argument: str, text: str, value: Any, seen: Survey) -> NoReturn:
    if argument == "modules_to_save":
        parts = "modules"
        rule = "A list has names or such endings."
        fitting = [name for name, layer in seen.modules if name and next(layer.parameters(), None) is not None]
    else:
        parts = "linear layers"
        rule = "A list has such endings, a string is a regular expression for the full name."
        fitting = [part.names.full for part in seen.parts if part.stack is not None or is_linear(part.owner)]
    if argument == "target_modules":
        rule += " 'all-linear', alone or in a list, means all linear layers."
    endings = sorted({last_part(name) for name in fitting})
    raise ValueError(
        f"{argument}={value!r}: no module of this model fits {text!r}. Its {parts} end in {endings}. {rule}"
    )


def foreign_adapter(module: nn.Module) -> str | None:
    kind = f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
    for part, file, base in (("layer", "tuners.tuners_utils", "BaseTunerLayer"), ("model", "peft_model", "PeftModel")):
        library = sys.modules.get(f"peft.{file}")
        if library is not None and isinstance(module, getattr(library, base)):
            return f"{kind}, a {part} with a PEFT adapter"
    # ScriptModules need keys()
    names = {name.lower() for name in (*module._parameters.keys(), *module._modules.keys())}
    if not isinstance(module, LoRALayer) and any(names.issuperset(pair) for pair in FOREIGN):
        return f"{kind}, a layer that contains another library's adapter"
    return None
