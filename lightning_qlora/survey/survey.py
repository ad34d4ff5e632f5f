"""Survey: what everyone asks of a module before it is converted, from one walk over it.

`survey` walks over the module, and `decide` (`selection.py`) reads plain values alone, so it needs no module:

    Survey(parts=[Part(Names("head", ("head",), "head"), Kind.LINEAR, shape=(64, 64))])
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_qlora.experts.expert_selection import COUNTS, Routers, expert_parameters
from lightning_qlora.experts.experts import ExpertParameter, QLoRAExperts
from lightning_qlora.layers.derived import Derived
from lightning_qlora.layers.kinds import LINEAR as LINEAR_KIND
from lightning_qlora.layers.kinds import is_linear, is_packed, kind_of
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import (
    Names,
    inside,
    is_transformers_model,
    join,
    only_child_of,
    without_wrappers,
)
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.layers.qlora_linear import MEMBERS
from lightning_qlora.lightning_copies import classes
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.provenance import (
    LOADED,
    NOTHING_KNOWN,
    Origins,
    origins_of,
    parameters_of,
)
from lightning_qlora.survey.records import is_recorded


class Kind(Enum):
    LINEAR = "a linear layer, with a weight in floats"
    PACKED = "a linear layer of another library, with a weight in 4 bits"
    STACK = "the experts of one parameter"
    QUANTIZED = "a layer of this package that was quantized while its model loaded"
    QUANTIZED_STACK = "the same of the experts of one parameter"
    EXPERTS = "the module of such experts: their parameter is decided about"
    CONVERTED = "a layer of an earlier conversion"
    DECIDED = "another part that an earlier conversion derived, as an embedding with rows that train"
    SCRIPT = "a torch.jit.ScriptModule"
    OTHER = "any other module"


QUANTIZED_KINDS = (Kind.QUANTIZED, Kind.QUANTIZED_STACK)
STACKS = (Kind.STACK, Kind.QUANTIZED_STACK)
LINEAR = (Kind.LINEAR, Kind.PACKED, Kind.QUANTIZED, *STACKS)
DECIDED = (Kind.EXPERTS, Kind.CONVERTED, Kind.DECIDED)  # by others, or before


class Parameter(NamedTuple):
    trains: bool = True
    dtype: torch.dtype = torch.float32
    new: str | None = None  # why its value is random
    ties: tuple[str, ...] = ()  # names of the same parameter in other modules


@dataclass(frozen=True)
class Part:
    """A module, or the experts of one parameter.

    Attributes:
        owner: The module; of experts the one that holds their parameter.
        parameters: Key -> each parameter that the module holds itself; of experts theirs alone.
        key: Of the weight, in the owner.
        shape: Of the weight, as it is stored; of one in 4 bits, and of an expert, [out, in].
        computed: Which of weight and bias are no parameters of a linear layer.
        member: What of the layer, or of its class, a 4-bit layer would replace.
        is_left_dense: Whether the model around it was loaded in 4 bits, and it was not.
        is_in_frozen_model: Whether nothing trains in a transformers model around it.
    """

    names: Names
    kind: Kind = Kind.OTHER
    owner: Any = None
    stack: ExpertParameter | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=lambda: {"weight": Parameter()})
    key: str = "weight"
    shape: tuple[int, int] = (0, 0)
    computed: tuple[str, ...] = ()
    member: str | None = None
    has_parts: bool = False
    has_stacks: bool = False
    is_recorded: bool = False  # by an earlier conversion
    is_output_embedding: bool = False
    is_in_metric: bool = False
    is_router: bool = False
    is_left_dense: bool = False
    is_in_frozen_model: bool = False

    @property
    def class_name(self) -> str:
        return type(self.owner).__name__

    @property
    def is_linear(self) -> bool:
        """Whether it has a weight that 4 bits could replace."""
        return self.kind in LINEAR

    @property
    def weight(self) -> Parameter:
        """Its weight; of a layer in 4 bits of this package lora_A, which trains in place of it."""
        return self.parameters["lora_A" if self.kind in QUANTIZED_KINDS else self.key]

    @property
    def trains(self) -> bool:
        return any(parameter.trains for parameter in self.parameters.values())


Agree = Callable[[Origins], Origins]


@dataclass
class Survey:
    parts: list[Part]  # the modules in the order of `named_modules`, each followed by the experts that it holds
    trains: bool = True
    origins: Origins = NOTHING_KNOWN
    attributes: set[str] = field(default_factory=set)  # the names of attributes, parameters and parts of all modules
    was_converted: bool = False

    @property
    def class_name(self) -> str:
        return self.parts[0].class_name

    @property
    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        return ((part.names.full, part.owner) for part in self.parts if part.stack is None)


def survey(modules: Parts, agree: Agree = lambda origins: origins) -> Survey:
    """Survey a module, by its modules with all of their names. Lazy layers must have run.

    `agree`: which of the origins that the ranks see are those of all.
    """
    origins = agree(origins_of(modules.outside_metrics))
    facts = _Facts(modules, origins.new)
    parts = list(facts.parts())
    was_converted = any(part.kind is Kind.CONVERTED for part in parts)
    return Survey(parts, facts.trains, origins, facts.attributes, was_converted)


class _Facts:
    def __init__(self, modules: Parts, new: Mapping[str, str]) -> None:
        self.modules = dict(modules.named)
        self.names = _names(modules)
        parameters = modules.parameters
        outside = modules.outside_metrics
        self.trains = any(parameter.requires_grad for parameter in parameters_of(outside.modules))
        # Networks that measure do not train: with other weights they would give other numbers.
        self.in_metrics = {*map(id, modules.modules)} - {*map(id, outside.modules)}
        self.new = {id(value): new[name] for name, _, _, value in parameters if name in new}
        self.holders: dict[int, dict[str, int]] = defaultdict(dict)  # of a parameter: each of its names -> its module
        for name, owner, _, parameter in parameters:
            self.holders[id(parameter)][name] = id(owner)
        self.is_new = modules.traits.is_new
        self.attributes = set[str]()
        for part in modules.modules:  # ScriptModules need keys()
            self.attributes.update(vars(part), part._parameters.keys(), part._modules.keys())
        kinds = {*map(type, modules.modules)}
        knows_experts = any("expert" in name for name in self.attributes) or any(
            hasattr(kind, name) for kind in kinds for name in ("experts", *COUNTS)
        )
        self.routers = Routers(self.modules) if knows_experts else None  # else there is no stack and no router
        self.output_embeddings = modules.output_embeddings
        self.in_frozen_models: set[int] = set()
        for inside_model in modules.models.values():
            if not any(parameter.requires_grad for parameter in parameters_of(inside_model)):
                self.in_frozen_models.update(map(id, inside_model))
        self.left_dense: set[int] = set()
        for name, module in modules.named:
            if getattr(module, "is_loaded_in_4bit", False) is True or vars(module).get(LOADED):
                self.left_dense.update(id(part) for _, part in modules.inside(name))

    def parts(self) -> Iterator[Part]:
        for name, module in self.modules.items():
            stacks = [] if self.routers is None else expert_parameters(module)
            kind = _kind(module)
            yield Part(
                names=self.names[id(module)],
                kind=kind,
                owner=module,
                parameters=self._parameters(module, module._parameters),
                has_parts=bool(module._modules),
                has_stacks=bool(stacks),
                is_recorded=not self.is_new and is_recorded(module),
                **(self._facts_of_linear(name, module, kind) if kind in LINEAR else {}),
            )
            yield from map(self._stack, stacks)

    def _facts_of_linear(self, name: str, layer: Any, kind: Kind) -> dict[str, Any]:
        is_dense = kind is Kind.LINEAR
        stored = ("weight", "bias") if isinstance(layer, nn.Linear) else ("weight",)
        computed = [key for key in stored if key not in layer._parameters]
        return {
            "shape": _shape(layer, kind),
            "computed": () if kind is Kind.QUANTIZED else tuple(computed),
            "member": self._replaced_member(layer) if is_dense else None,
            "is_output_embedding": id(layer) in self.output_embeddings,
            "is_in_metric": id(layer) in self.in_metrics,
            "is_router": self.routers is not None and self.routers.has(name, layer),
            "is_left_dense": is_dense and id(layer) in self.left_dense,
            "is_in_frozen_model": id(layer) in self.in_frozen_models,
        }

    def _replaced_member(self, layer: nn.Module) -> str | None:
        if kind_of(type(layer)).forward is not None:
            return None
        # torch's own classes are nn.Linear's, and parametrized or sharded layers, which other rules refuse
        classes_of = [kind for kind in type(layer).__mro__[:-1] if not kind.__module__.startswith("torch.")]
        of_class = {name for kind in classes_of for name in vars(kind)}
        if "__call__" in of_class:
            return "__call__"
        if not isinstance(layer, nn.Linear):  # a class that computes the same
            return min(of_class & (MEMBERS - {"__deepcopy__"} | {*LINEAR_KIND.sizes}), default=None)
        own = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules} - {"weight"}
        return min((of_class | own) & MEMBERS, default=None)

    def _stack(self, stack: ExpertParameter) -> Part:
        names = self.names[id(stack.owner)]
        own = [join(each, stack.key) for each in names.for_patterns]
        holder, key, kind = stack.owner, stack.key, Kind.STACK
        if stack.layer is not None:
            holder, key, kind = stack.layer, "lora_A", Kind.QUANTIZED_STACK
        return Part(
            Names(join(names.full, stack.key), (*own, *names.for_patterns), join(names.for_seed, stack.key)),
            kind,
            stack.owner,
            stack,
            self._parameters(holder, {key: holder._parameters[key]}),
            stack.key,
            stack.shape,
            is_in_metric=id(stack.owner) in self.in_metrics,
        )

    def _parameters(self, holder: nn.Module, parameters: Mapping[str, Any]) -> dict[str, Parameter]:
        result = {}
        for key, parameter in parameters.items():
            if parameter is not None:
                holders = self.holders[id(parameter)]
                ties = tuple(name for name, owner in holders.items() if owner != id(holder))
                new = self.new.get(id(parameter))
                result[key] = Parameter(parameter.requires_grad, parameter.dtype, new, ties)
        return result


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, torch.jit.ScriptModule):
        return Kind.SCRIPT
    if isinstance(module, Derived) and module.is_decided:
        return Kind.DECIDED
    if isinstance(module, LoRALayer):
        if not module.is_unfinished:
            return Kind.CONVERTED
        return Kind.EXPERTS if isinstance(module, QLoRAExperts) else Kind.QUANTIZED
    if not is_linear(module):
        return Kind.OTHER
    return Kind.PACKED if is_packed(module) else Kind.LINEAR


def _shape(module: Any, kind: Kind) -> tuple[int, int]:
    weight: Any = module._parameters.get("weight")
    if kind is Kind.PACKED:
        weight = weight.quant_state
    elif kind is Kind.QUANTIZED:
        weight = module.weight
    if weight is None:
        return 0, 0
    rows, columns = weight.shape
    return rows, columns


def _names(modules: Parts) -> dict[int, Names]:
    is_lightning = isinstance(modules.root, classes(LightningModule))
    only_child = only_child_of(modules.root) if is_lightning else None
    model: str | None = None
    seeds: dict[int, str] = {}
    full: dict[int, list[str]] = defaultdict(list)
    for_patterns: dict[int, list[str]] = defaultdict(list)
    for name, module in modules.places:
        if model is None or not inside(name, model):
            model = name if is_transformers_model(module) else None
        in_child = name.partition(".")[2] if is_lightning else ""
        in_model = "" if model is None else name[len(model) :].lstrip(".")
        seed = without_wrappers(in_model or (only_child and in_child) or name)
        if isinstance(module, PackedLayer):
            seed = vars(module)["seed_name"]  # from the model that was loaded, which may be a part of another one now
        seeds.setdefault(id(module), seed)
        full[id(module)].append(name)
        each = [text for text in (name, in_child, in_model, seed) if text or not name]
        for_patterns[id(module)] += dict.fromkeys([*each, *map(without_wrappers, each)])
    return {
        number: Names(name, tuple(for_patterns[number]), seeds[number], tuple(others))
        for number, (name, *others) in full.items()
    }
