"""Which layers of a module become 4-bit layers, which stay dense, and why: the first of `RULES` that applies decides.

Before the rules, a module in modules_to_save trains in full with all that is in it, and a ScriptModule, an embedding
with rows that train and what an earlier conversion has seen stay as they are. A layer that was quantized while its
model loaded counts as the dense layer that it was.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.candidate import Candidate, Context, SavedLayers
from lightning_qlora.layers.expert_selection import expert_parameters
from lightning_qlora.layers.experts import ExpertParameter, QLoRAExperts
from lightning_qlora.layers.kinds import is_linear, is_packed, pop_packed_weight
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import LayerNames, inside, join, names_of_modules, outer_names
from lightning_qlora.layers.provenance import new_parameters
from lightning_qlora.layers.qlora_linear import REPLACED, QLoRALinear
from lightning_qlora.layers.records import is_recorded
from lightning_qlora.layers.token_selection import select_tokens
from lightning_qlora.layers.trainable_tokens import TrainableTokens

IN_MODULES_TO_SAVE = "in modules_to_save"


class Rule(NamedTuple):
    """What happens with a layer, or with a stack of experts."""

    when: str  # as in docs/layers.md
    by_default: str | None  # what happens if target_modules does not name it; None: the rule does not apply
    if_named: str | None  # the same if target_modules names it; in ["all-linear", "lm_head"] it names "lm_head"
    reason: Callable[[Candidate], str | bool | None]  # whether it applies: its reason, or True, for `when`


CONVERT = "4 bits and an adapter"
TRAIN = "trains in full"
SKIP = "dense and frozen"
WARN = "dense and frozen, with a warning"
REFUSE = "an error"
ROWS = "some rows train"  # of embeddings, decided before the rules
RULES = (
    Rule("in 4 bits in the checkpoint to load", CONVERT, CONVERT, lambda layer: layer.saved_arguments is not None),
    Rule("in exclude_modules", SKIP, SKIP, lambda layer: layer.names.match_outer(layer.config.exclude_modules)),
    Rule("new: without pretrained values", TRAIN, None, lambda layer: layer.new),
    Rule("not in target_modules", SKIP, None, lambda layer: not layer.config.all_linear),
    Rule("no linear layer", None, REFUSE, lambda layer: not layer.is_linear and "only linear layers can be converted"),
    Rule("of a class with members that 4-bit layers have", SKIP, REFUSE, lambda layer: layer.name_clash()),
    Rule("tied, parametrized, or not in floats", SKIP, WARN, lambda layer: layer.cannot_convert()),
    Rule("an output embedding, a router, or frozen by the module", SKIP, None, lambda layer: layer.not_by_default()),
    Rule("not larger than its adapter", TRAIN, None, lambda layer: layer.can_train and layer.too_small()),
    Rule(
        "not larger than its adapter, in a mixture of experts or where nothing trains",
        SKIP,
        None,
        lambda layer: layer.too_small(),
    ),
    Rule("without weights", SKIP, SKIP, lambda layer: layer.is_empty()),
    Rule("not in 4 bits in the checkpoint", SKIP, SKIP, lambda layer: layer.context.saved is not None),
    Rule("any other linear layer", CONVERT, CONVERT, lambda layer: True),
)


class ToConvert(NamedTuple):
    """A layer to convert, or the experts of one parameter."""

    name: str
    part: nn.Module | ExpertParameter
    config: QLoRAConfig  # the arguments, with its own rank and lora_alpha
    seed_name: str

    @property
    def place(self) -> tuple[Any, str]:
        """The module that holds its weight, and the key."""
        if isinstance(self.part, ExpertParameter):
            return self.part.owner, self.part.key
        return self.part, "weight"

    @property
    def weight_name(self) -> str:
        """The name of its weight; that of a stack of experts is the parameter."""
        return self.name if isinstance(self.part, ExpertParameter) else join(self.name, "weight")

    def convert(self, device: torch.device | None = None, weights: Iterable[Tensor] | None = None) -> LoRALayer:
        """Convert it, in place, to a 4-bit layer. For the arguments see `QLoRAExperts.from_parameter`."""
        name, part, config, seed_name = self
        if isinstance(part, ExpertParameter):
            return QLoRAExperts.from_parameter(part, config, name, device, seed_name, weights)
        if is_packed(part):
            setattr(part.weight, REPLACED, part)  # for an optimizer that was created before conversion
            QLoRALinear.from_packed(part, *pop_packed_weight(part), config, name, seed_name)
        else:
            QLoRALinear.from_linear(part, config, name, device, seed_name)
        assert isinstance(part, QLoRALinear)
        return part


class Decision(NamedTuple):
    """What conversion does with a layer, a stack of experts, a parameter, or a module in modules_to_save."""

    action: str  # an outcome of a rule
    reason: str
    layer: ToConvert | None = None  # if it is converted


@dataclass
class Selection:
    """The decisions about a module, by name; what has none, and is in nothing that has one, is frozen."""

    decisions: dict[str, Decision] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)  # indices of the rows that train
    names: dict[int, LayerNames] = field(default_factory=dict)  # id of each module -> its names

    def reasons(self, *actions: str) -> dict[str, str]:
        """Name -> reason, of what has one of these outcomes."""
        return {name: each.reason for name, each in self.decisions.items() if each.action in actions}

    @property
    def convert(self) -> dict[str, ToConvert]:
        """The layers to convert, and the parameters with the weights of experts."""
        return {name: each.layer for name, each in self.decisions.items() if each.layer is not None}

    @property
    def train(self) -> dict[str, str]:
        """Why a module or parameter trains in full."""
        return self.reasons(TRAIN)

    @property
    def skip(self) -> dict[str, str]:
        """Why a linear layer, or a stack of experts, is dense and frozen."""
        return self.reasons(SKIP, WARN)

    def decide(self, layer: Candidate) -> None:
        """Do what the first rule that applies says."""
        if not (layer.is_linear or layer.is_named or layer.new):
            return
        for rule in RULES:
            outcome = rule.if_named if layer.is_named else rule.by_default
            reason = outcome is not None and rule.reason(layer)
            if reason:
                break
        text = rule.when if reason is True else str(reason)
        to_convert = (
            ToConvert(layer.name, layer.part, layer.config, layer.names.seed_name) if outcome == CONVERT else None
        )
        self.decisions[layer.name] = Decision(str(outcome), text, to_convert)

    def of_parameters(self, module: nn.Module) -> dict[int, Decision]:
        """Id of each parameter with a decision -> that about it, or about the innermost part around it.

        A parameter with several names trains in full if it does by one of them.
        """
        result: dict[int, Decision] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            decision = next((self.decisions[part] for part in outer_names(name) if part in self.decisions), None)
            if decision is not None and (decision.action == TRAIN or id(parameter) not in result):
                result[id(parameter)] = decision
        return result


def select_layers(module: nn.Module, config: QLoRAConfig, saved: SavedLayers | None = None) -> Selection:
    """Decide for every linear layer of a module; with `saved`, exactly the layers of a checkpoint are converted.

    The module may be a part of another one, for which a pattern that matches nothing here is meant. `check_selection`
    refuses such patterns in a whole module.
    """
    choice = Selection(names=names_of_modules(module))
    context = Context(module, config, saved)
    new = new_parameters(module)
    parts = context.modules
    whole = [name for name, part in parts.items() if choice.names[id(part)].match(config.modules_to_save)]
    choice.decisions.update(dict.fromkeys(whole, Decision(TRAIN, IN_MODULES_TO_SAVE)))
    choice.tokens = select_tokens(module, config.trainable_token_indices, choice.names)
    for name, part in parts.items():
        names = choice.names[id(part)]
        if any(inside(name, outer) for outer in whole):
            continue
        if isinstance(part, torch.jit.ScriptModule):
            whole.append(name)
            choice.decisions[name] = Decision(SKIP, "a torch.jit.ScriptModule, which can't be changed")
            continue
        if name in choice.tokens:
            choice.decisions[name] = Decision(ROWS, f"{len(choice.tokens[name])} rows train")
            continue
        if isinstance(part, TrainableTokens):
            continue
        if is_recorded(part):
            if is_linear(part) and not isinstance(part, QLoRALinear):
                trains = any(parameter.requires_grad for parameter in part.parameters())
                choice.decisions[name] = Decision(TRAIN if trains else SKIP, "as an earlier conversion left it")
            continue
        stacks = expert_parameters(part)
        for stack in stacks:
            choice.decide(Candidate(join(name, stack.key), stack, names_of_stack(names, stack), None, context))
        if stacks:
            continue
        new_here = {key: new[id(p)] for key, p in part._parameters.items() if id(p) in new}
        if part._modules and not names.match_outer(config.exclude_modules):
            choice.decisions.update({join(name, key): Decision(TRAIN, reason) for key, reason in new_here.items()})
        reason = None
        if not part._modules:
            reason = next(iter(new_here.values()), None)
        if not isinstance(part, QLoRAExperts):  # a stack: selected with the module around it
            choice.decide(Candidate(name, part, names, reason, context))
    return choice


def names_of_stack(names: LayerNames, stack: ExpertParameter) -> LayerNames:
    """The names of a stack of experts: its own, and for patterns those of the module that holds it."""
    own = [join(name, stack.key) for name in names.all]
    return LayerNames(own + names.all, join(names.seed_name, stack.key))
