"""Which layers of a module become 4-bit layers, which stay dense, and why: the first of `RULES` that applies decides.

Before the rules, a module in modules_to_save trains in full with all that is in it, and a ScriptModule, a layer with
rows that train and what an earlier conversion has seen stay as they are. A layer that was quantized while its model
loaded counts as the dense layer that it was.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from lightning_qlora.config import ALL_LINEAR, QLoRAConfig
from lightning_qlora.experts.experts import ExpertParameter
from lightning_qlora.layers.names import join, outer_names
from lightning_qlora.quantization.blockwise import FLOATS
from lightning_qlora.selection.patterns import Patterns
from lightning_qlora.selection.token_selection import TokenRows
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.survey import DECIDED, QUANTIZED_KINDS, STACKS, Kind, Part, Survey, survey
from lightning_qlora.survey.untrained import BY_VALUES

IN_MODULES_TO_SAVE = "in modules_to_save"
FROZEN = "frozen by the module"
LARGE_RANK = "an adapter of rank"  # beginning of a reason
FEWEST = 64  # weights, one block of the default size: 4 bits would save nothing
SavedLayers = Mapping[str, Mapping[str, Any]]  # name of a layer in a checkpoint -> its own arguments


@dataclass(frozen=True)
class Case:
    """A part that the rules decide about. Methods that give a reason give None where it does not apply."""

    part: Part
    config: QLoRAConfig  # with its own rank and lora_alpha
    is_named: bool  # whether target_modules names it; a pattern for any name does not mean the whole module
    is_excluded: bool
    trains: bool  # whether anything of the module trains
    new: str | None  # why its values are new
    saved: Mapping[str, Any] | None  # its own arguments in the checkpoint
    of_checkpoint: bool  # whether the layers of a checkpoint are converted

    def is_not_linear(self) -> str | None:
        return None if self.part.is_linear else "only linear layers can be converted"

    def has_member(self) -> str | None:
        if self.part.member is None:
            return None
        effect = "which a 4-bit layer would replace"
        if self.part.member == "__call__":
            effect = "which may compute something else"
        return f"{self.part.class_name} has a {self.part.member} of its own, {effect}"

    def cannot_convert(self) -> str | None:
        part = self.part
        if part.kind in QUANTIZED_KINDS:
            return None
        if part.computed:
            return f"its {part.computed[0]} is computed (parametrized), not stored"
        weight = part.weight
        if weight.dtype not in FLOATS and part.kind is not Kind.PACKED:
            reason = f"its weight is {str(weight.dtype).removeprefix('torch.')}"
            if "float8" in reason:
                reason += "; load the model in configure_model or plugin.init(), where it is dequantized"
            return reason
        return f"its weight is tied to {weight.ties[0]}" if weight.ties else None

    def not_by_default(self) -> str | None:
        part = self.part
        if part.is_output_embedding:
            return "output embedding; name it in target_modules to convert it"
        if part.is_in_metric:
            return "in a metric; name it in target_modules to convert it"
        if part.is_router:
            return "router of experts; name it in target_modules to convert it"
        is_frozen = not part.weight.trains
        if part.kind is Kind.PACKED:  # bitsandbytes freezes what it quantizes: the rest of a model decides
            is_frozen = part.is_in_frozen_model
        if is_frozen and self.trains:
            return FROZEN
        if part.is_left_dense and not self.too_small():
            return "dense in a model that was loaded in 4 bits; name it in target_modules to convert it"
        return None

    def too_small(self) -> str | None:
        rows, columns = self.part.shape
        if rows * columns <= FEWEST:
            return f"its {rows}x{columns} weights are too few for 4 bits"
        if self.config.r * (rows + columns) < rows * columns:
            return None
        return f"{LARGE_RANK} {self.config.r} would not be smaller than its {rows}x{columns} weights"

    def too_small_and_trains(self) -> str | None:
        """Conversion makes nothing train in a module that the user froze."""
        return self.too_small() if self.trains and self.part.kind not in STACKS else None

    def is_empty(self) -> str | None:
        rows, columns = self.part.shape
        return None if rows and columns else f"its {rows}x{columns} weight is empty"


class Rule(NamedTuple):
    when: str  # as in docs/layers.md
    by_default: str | None  # what happens if target_modules does not name it; None: the rule does not apply
    if_named: str | None  # the same if target_modules names it; in ["all-linear", "lm_head"] it names "lm_head"
    reason: Callable[[Case], str | bool | None]  # whether it applies: its reason, or True, for `when`


CONVERT = "4 bits and an adapter"
TRAIN = "trains in full"
SKIP = "dense and frozen"
IN_VAIN = "dense and frozen, with a mark in the report"
REFUSE = "an error"
SOME_ROWS = "some rows train"  # of embeddings, decided before the rules
RULES = (
    Rule("in 4 bits in the checkpoint to load", CONVERT, CONVERT, lambda case: case.saved is not None),
    Rule("in exclude_modules", SKIP, SKIP, lambda case: case.is_excluded),
    Rule("new: without pretrained values", TRAIN, None, lambda case: case.new),
    Rule("not in target_modules", SKIP, None, lambda case: ALL_LINEAR not in case.config.target_modules),
    Rule("no linear layer", None, REFUSE, Case.is_not_linear),
    Rule("of a class that defines a name which a 4-bit layer would replace", SKIP, REFUSE, Case.has_member),
    Rule("tied, parametrized, or not in floats", SKIP, IN_VAIN, Case.cannot_convert),
    Rule("an output embedding, a router, in a metric, or frozen by the module", SKIP, None, Case.not_by_default),
    Rule("not larger than its adapter", TRAIN, None, Case.too_small_and_trains),
    Rule("not larger than its adapter, in a mixture of experts or where nothing trains", SKIP, None, Case.too_small),
    Rule("without weights", SKIP, SKIP, Case.is_empty),
    Rule("not in 4 bits in the checkpoint", SKIP, SKIP, lambda case: case.of_checkpoint),
    Rule("any other linear layer", CONVERT, CONVERT, lambda case: True),
)


class Row(NamedTuple):
    name: str
    action: str  # an outcome of a rule
    reason: str
    owner: Any = None  # the module that holds its weight, or the module itself
    key: str = ""  # of its weight, or of the parameter, in the owner; "": all of the module
    config: QLoRAConfig | None = None  # the arguments of a layer to convert, with its own rank and lora_alpha
    seed_name: str = ""
    stack: ExpertParameter | None = None

    @property
    def weight_name(self) -> str:
        return self.name if self.stack is not None else join(self.name, self.key)


@dataclass
class Selection:
    """The rows of a module, by name; what has none, and is in nothing that has one, is frozen."""

    rows: dict[str, Row]
    some_rows: Any = None  # `TokenRows`: the rows that train of embeddings
    has_patterns: bool = False  # whether an argument names modules or parameters

    def __post_init__(self) -> None:
        self.convert = {name: row for name, row in self.rows.items() if row.action == CONVERT}
        # Name -> reason.
        self.train = {name: row.reason for name, row in self.rows.items() if row.action == TRAIN}
        self.skip = {name: row.reason for name, row in self.rows.items() if row.action in (SKIP, IN_VAIN)}

    def of_parameter(self, part: Part, key: str) -> Row | None:
        """The row of a parameter, or of the innermost part around it; with several names, one that lets it train."""
        names = [join(name, key) for name in (part.names.full, *part.names.others)]
        if key in part.parameters:
            names += part.parameters[key].ties
        innermost = (next((outer for outer in outer_names(name) if outer in self.rows), None) for name in names)
        rows = [self.rows[name] for name in innermost if name is not None]
        return next((row for row in rows if row.action == TRAIN), next(iter(rows), None))


def select_layers(module: nn.Module, config: QLoRAConfig, saved: SavedLayers | None = None) -> Selection:
    """Decide for every linear layer of a module; with `saved`, exactly the layers of a checkpoint are converted.

    The module may be a part of another one, for which a pattern that matches nothing here is meant. `check_patterns`
    refuses such patterns in a whole module.
    """
    return decide(survey(Parts.of(module, wrappers=())), config, saved)


def decide(seen: Survey, config: QLoRAConfig, saved: SavedLayers | None = None) -> Selection:
    arguments = _Arguments(config, saved, seen.trains)
    some_rows: Any = None
    if config.trainable_token_indices:
        some_rows = TokenRows(seen, config.trainable_token_indices)
    rows = []
    if config.modules_to_save:
        in_full = Patterns(config.modules_to_save)
        modules = (part for part in seen.parts if part.kind not in STACKS)
        rows = [_whole(part, TRAIN, IN_MODULES_TO_SAVE) for part in modules if in_full.match(part.names.for_patterns)]
    whole = {row.name for row in rows}  # decided with all that is in them
    for part in seen.parts:
        name = part.names.full
        if not whole.isdisjoint(outer_names(name)):
            continue
        if part.kind is Kind.SCRIPT:
            rows.append(_whole(part, SKIP, "a torch.jit.ScriptModule, which can't be changed"))
            whole.add(name)
        elif some_rows is not None and name in some_rows:
            rows.append(_whole(part, SOME_ROWS, f"{len(some_rows[name])} rows train"))
        elif part.is_recorded and part.is_linear:
            rows.append(_whole(part, TRAIN if part.trains else SKIP, "as an earlier conversion left it"))
        elif part.kind not in DECIDED and not part.is_recorded and not part.has_stacks:
            rows += _rows(arguments.case(part))
    has_patterns = bool(arguments.patterns or config.modules_to_save)
    return Selection({row.name: row for row in rows}, some_rows, has_patterns)


def _whole(part: Part, action: str, reason: str) -> Row:
    return Row(part.names.full, action, reason, part.owner)


def _rows(case: Case) -> Iterator[Row]:
    """The rows of new parameters beside the parts of a module, then that of the module, or of a stack, by the rules."""
    part = case.part
    names = part.names
    if part.has_parts and not case.is_excluded:
        for key, parameter in part.parameters.items():
            if parameter.new:
                yield Row(join(names.full, key), TRAIN, parameter.new, part.owner, key)
    if not (part.is_linear or case.is_named or case.new):
        return
    for rule in RULES:
        action = rule.if_named if case.is_named else rule.by_default
        reason = action is not None and rule.reason(case)
        if reason:
            break
    text = rule.when if reason is True else str(reason)
    config = case.config if action == CONVERT else None
    yield Row(names.full, str(action), text, part.owner, part.key, config, names.for_seed, part.stack)


class _Arguments:
    def __init__(self, config: QLoRAConfig, saved: SavedLayers | None, trains: bool) -> None:
        self._config = config
        self._saved = saved
        self._trains = trains
        given = {
            "target_modules": config.named_targets,
            "exclude_modules": config.exclude_modules,
            "r": config.rank_pattern,
            "lora_alpha": config.alpha_pattern,
        }
        self.patterns = {argument: Patterns(value) for argument, value in given.items() if value}
        self._of_parts = [argument for argument in ("lora_alpha", "r") if argument in self.patterns]
        self._configs: dict[str, QLoRAConfig] = {}  # by the arguments that differ: each is checked once

    def case(self, part: Part) -> Case:
        names = part.names.for_patterns
        saved = None if self._saved is None else self._saved.get(part.names.in_state_dicts)
        named = self.patterns.get("target_modules")
        excluded = self.patterns.get("exclude_modules")
        reasons = (each.new for each in part.parameters.values() if each.new and not part.has_parts)
        if part.kind in STACKS:  # what transformers did not find in the files is in 4 bits
            reasons = (reason for reason in reasons if reason.startswith(BY_VALUES))
        return Case(
            part=part,
            config=self._config_of(names, saved) if saved or self._of_parts else self._config,
            is_named=named is not None and part.names.full != "" and named.match(names),
            is_excluded=excluded is not None and excluded.match_outer(names),
            trains=self._trains,
            new=next(reasons, None),
            saved=saved,
            of_checkpoint=self._saved is not None,
        )

    def _config_of(self, names: tuple[str, ...], saved: Mapping[str, Any] | None) -> QLoRAConfig:
        own: dict[str, Any] = {}
        for argument in self._of_parts:
            own[argument] = self.patterns[argument].value(names, getattr(self._config, argument))
        own |= saved or {}
        key = repr(own)
        if key not in self._configs:
            self._configs[key] = self._config.with_own(own)
        return self._configs[key]
