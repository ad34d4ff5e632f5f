"""Survey: what everyone asks of a module before it is converted, from one walk over it.

`survey` walks over the module, and `decide` (`selection.py`) reads plain values alone, so it needs no module:

    Survey(parts=[Part(Names("head", ("head",), "head"), Kind.LINEAR, shape=(64, 64))])
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_qlora.layers.expert_selection import Routers, expert_parameters
from lightning_qlora.layers.experts import ExpertParameter
from lightning_qlora.layers.kinds import is_linear, is_packed
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import (
    Names,
    Place,
    inside,
    is_transformers_model,
    join,
    last_part,
    only_child_of,
    places_of,
    without_wrappers,
)
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.layers.provenance import (
    LOADED,
    OUTPUT_EMBEDDINGS,
    get_output_embeddings,
    loaded_models,
    models_of,
    new_parameters,
)
from lightning_qlora.layers.qlora_linear import MEMBERS
from lightning_qlora.layers.records import is_recorded
from lightning_qlora.layers.trainable_tokens import TrainableTokens
from lightning_qlora.lightning_copies import classes


class Kind(Enum):
    """What a part of a module is."""

    LINEAR = "a linear layer, with a weight in floats"
    PACKED = "a linear layer of another library, with a weight in 4 bits"
    STACK = "the experts of one parameter"
    QUANTIZED = "a layer of this package that was quantized while its model loaded"
    QUANTIZED_STACK = "the same of the experts of one parameter"
    EXPERTS = "the module of such experts: their parameter is decided about"
    CONVERTED = "a layer of an earlier conversion"
    TOKENS = "a layer with rows that train, of an earlier conversion"
    SCRIPT = "a torch.jit.ScriptModule"
    OTHER = "any other module"


QUANTIZED_KINDS = (Kind.QUANTIZED, Kind.QUANTIZED_STACK)
STACKS = (Kind.STACK, Kind.QUANTIZED_STACK)
LINEAR = (Kind.LINEAR, Kind.PACKED, Kind.QUANTIZED, *STACKS)
DECIDED = (Kind.EXPERTS, Kind.CONVERTED, Kind.TOKENS)  # by others, or before


class Parameter(NamedTuple):
    """A parameter that a part holds itself."""

    trains: bool = True
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    new: str | None = None  # why its value is random
    ties: tuple[str, ...] = ()  # names of the same parameter in other modules


@dataclass(frozen=True)
class Part:
    """A module, or the experts of one parameter.

    Attributes:
        owner: The module; of experts the one that holds the parameter.
        stack: The parameter with experts.
        parameters: Key -> each parameter of the module, and of experts theirs alone.
        key: Of the weight in the owner.
        computed: Which of weight and bias a linear layer has no parameter for.
        shape: Of the weight, as it is stored; of one in 4 bits, and of an expert, [out, in]; (0, 0): it has none.
        places: Its full names, several if the module is in several places.
        is_container: Whether it has parts.
        holds_stacks: Whether it holds experts in parameters.
        is_recorded: Whether an earlier conversion has seen it.
        is_output_embedding, is_router: What a linear layer computes.
        is_left_dense: Whether the model that holds it was loaded in 4 bits, and it was not.
        is_in_frozen_model: Whether nothing trains in a transformers model that holds it.
        member: A member of the class, or of the layer, that a 4-bit layer would replace.
    """

    names: Names
    kind: Kind = Kind.OTHER
    class_name: str = "Module"
    parameters: Mapping[str, Parameter] = field(default_factory=lambda: {"weight": Parameter()})
    key: str = "weight"
    computed: tuple[str, ...] = ()
    shape: tuple[int, int] = (0, 0)
    places: tuple[str, ...] = ()
    is_container: bool = False
    holds_stacks: bool = False
    is_recorded: bool = False
    is_output_embedding: bool = False
    is_router: bool = False
    is_left_dense: bool = False
    is_in_frozen_model: bool = False
    member: str | None = None
    owner: Any = None
    stack: ExpertParameter | None = None

    @property
    def is_linear(self) -> bool:
        """Whether it has a weight that 4 bits could replace."""
        return self.kind in LINEAR

    @property
    def weight(self) -> Parameter:
        """The weight; of a layer in 4 bits of this package lora_A, which trains in place of it."""
        return self.parameters["lora_A" if self.kind in QUANTIZED_KINDS else self.key]

    @property
    def trains(self) -> bool:
        """Whether one of its parameters does."""
        return any(parameter.trains for parameter in self.parameters.values())


@dataclass
class Survey:
    """A module before it is converted.

    Attributes:
        parts: The modules, each followed by the experts that it holds, in the order of `named_modules`.
        trains: Whether anything in the module trains.
        is_loaded: Whether a transformers model in it was loaded from weights.
        quantized_models: Name of each model that was quantized while it loaded -> its class.
        class_name: That of the module.
    """

    parts: list[Part]
    trains: bool = True
    is_loaded: bool = False
    quantized_models: dict[str, str] = field(default_factory=dict)
    class_name: str = "Module"

    @property
    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Name and module, as `named_modules`."""
        return ((part.names.full, part.owner) for part in self.parts if part.kind not in STACKS)


def survey(root: nn.Module) -> Survey:
    """Survey a module. Lazy layers must have run."""
    walk = _Walk(root)
    return Survey(
        parts=list(walk.parts()),
        trains=any(parameter.requires_grad for parameter in walk.parameters()),
        is_loaded=bool(loaded_models(walk.places)),
        quantized_models={
            place.name: type(place.module).__name__ for place in walk.places if LOADED in vars(place.module)
        },
        class_name=type(root).__name__,
    )


class _Walk:
    """The facts about single modules, by their ids."""

    def __init__(self, root: nn.Module) -> None:
        self.places = places_of(root)
        self.first: dict[int, Place] = {}
        for place in self.places:
            self.first.setdefault(id(place.module), place)
        self.names = _names(root, self.places)
        self.new = new_parameters(self.places)
        self.holders: dict[int, dict[int, str]] = defaultdict(dict)  # id of a parameter -> id of a module -> its name
        for name, module, _ in self.first.values():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self.holders[id(parameter)][id(module)] = join(name, key)
        modules = {place.name: place.module for place in self.first.values()}
        self.routers = Routers(modules)
        self.members_of: Callable[[Any], frozenset[str]] = cache(_members_of_class)
        self.output_embeddings = set(map(id, get_output_embeddings(modules.values())))
        self.in_frozen_models: set[int] = set()
        for number in models_of(self.places):
            inner = [place.module for place in self.places[number : self.places[number].end]]
            if not any(p.requires_grad for module in inner for p in module._parameters.values() if p is not None):
                self.in_frozen_models.update(map(id, inner))
        self.left_dense: set[int] = set()
        for number, place in enumerate(self.places):
            if getattr(place.module, "is_loaded_in_4bit", False) or vars(place.module).get(LOADED):
                self.left_dense.update(id(inner.module) for inner in self.places[number : place.end])

    def parameters(self) -> Iterator[nn.Parameter]:
        for place in self.first.values():
            yield from (parameter for parameter in place.module._parameters.values() if parameter is not None)

    def parts(self) -> Iterator[Part]:
        for name, module, _ in self.first.values():
            stacks = expert_parameters(module)
            yield self._part(name, module, bool(stacks))
            yield from (self._stack(name, stack) for stack in stacks)

    def _part(self, name: str, module: Any, holds_stacks: bool) -> Part:
        names, places = self.names[id(module)]
        kind = _kind(module)
        return Part(
            names=names,
            kind=kind,
            class_name=type(module).__name__,
            parameters=self._parameters(module, module._parameters),
            places=places,
            is_container=bool(module._modules),
            holds_stacks=holds_stacks,
            is_recorded=is_recorded(module),
            owner=module,
            **(self._facts_of_linear(name, module, kind) if kind in LINEAR else {}),
        )

    def _facts_of_linear(self, name: str, layer: Any, kind: Kind) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "shape": _shape(layer, kind),
            "is_output_embedding": id(layer) in self.output_embeddings or last_part(name) in OUTPUT_EMBEDDINGS,
            "is_router": self.routers.has(name, layer),
        }
        if kind is Kind.PACKED:
            facts["is_in_frozen_model"] = id(layer) in self.in_frozen_models
        if kind is Kind.LINEAR:
            facts["is_left_dense"] = id(layer) in self.left_dense
            facts["member"] = self._replaced_member(layer)
        if kind is not Kind.QUANTIZED:
            facts["computed"] = tuple(key for key in ("weight", "bias") if key not in layer._parameters)
        return facts

    def _stack(self, name: str, stack: ExpertParameter) -> Part:
        names, places = self.names[id(stack.owner)]
        own = [join(each, stack.key) for each in names.for_patterns]
        holder, key, kind = stack.owner, stack.key, Kind.STACK
        if stack.loaded is not None:
            holder, key, kind = stack.loaded, "lora_A", Kind.QUANTIZED_STACK
        return Part(
            names=Names(join(name, stack.key), (*own, *names.for_patterns), join(names.for_seed, stack.key)),
            kind=kind,
            class_name=type(stack.owner).__name__,
            parameters=self._parameters(holder, {key: holder._parameters[key]}),
            key=stack.key,
            shape=stack.shape,
            places=tuple(join(place, stack.key) for place in places),
            owner=stack.owner,
            stack=stack,
        )

    def _parameters(self, holder: nn.Module, parameters: Mapping[str, Any]) -> dict[str, Parameter]:
        result = {}
        for key, parameter in parameters.items():
            if parameter is not None:
                holders = self.holders[id(parameter)]
                ties = tuple(name for owner, name in holders.items() if owner != id(holder)) if len(holders) > 1 else ()
                new = self.new.get(id(parameter))
                result[key] = Parameter(parameter.requires_grad, parameter.dtype, parameter.device, new, ties)
        return result

    def _replaced_member(self, layer: nn.Module) -> str | None:
        """A member of a subclass of nn.Linear, or of a layer, that keeps it from becoming a QLoRALinear."""
        if not isinstance(layer, nn.Linear):
            return None
        of_class = self.members_of(type(layer))
        if "__call__" in of_class:
            return "__call__"
        own = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules} - {"weight"}
        return min((of_class | own) & MEMBERS, default=None)


def _kind(module: nn.Module) -> Kind:
    if isinstance(module, torch.jit.ScriptModule):
        return Kind.SCRIPT
    if isinstance(module, TrainableTokens):
        return Kind.TOKENS
    if isinstance(module, LoRALayer):
        if not module.loaded:
            return Kind.CONVERTED
        return Kind.EXPERTS if module.is_stack else Kind.QUANTIZED
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


def _names(root: nn.Module, places: list[Place]) -> dict[int, tuple[Names, tuple[str, ...]]]:
    """Id of each module -> its names, and all of its full names."""
    is_lightning = isinstance(root, classes(LightningModule))
    only_child = only_child_of(root)
    model: str | None = None
    seeds: dict[int, str] = {}
    full: dict[int, list[str]] = {}
    for_patterns: dict[int, list[str]] = {}
    for name, module, _ in places:
        if model is None or not inside(name, model):
            model = name if is_transformers_model(module) else None
        in_child = name.partition(".")[2] if is_lightning else ""
        in_model = "" if model is None else name[len(model) :].lstrip(".")
        if isinstance(module, PackedLayer):
            seed = vars(module)["seed_name"]  # from the model that was loaded, which may be a part of another one now
        else:
            seed = without_wrappers(in_model or (only_child and in_child) or name)
        seeds.setdefault(id(module), seed)
        full.setdefault(id(module), []).append(name)
        each = [text for text in (name, in_child, in_model, seed) if text or not name]
        for_patterns.setdefault(id(module), []).extend(dict.fromkeys([*each, *map(without_wrappers, each)]))
    return {key: (Names(names[0], tuple(for_patterns[key]), seeds[key]), tuple(names)) for key, names in full.items()}


def _members_of_class(kind: type[nn.Module]) -> frozenset[str]:
    # torch's own classes are nn.Linear's, and parametrized or sharded layers, which other rules refuse
    kinds = [each for each in kind.__mro__ if not each.__module__.startswith("torch.")]
    return frozenset(name for each in kinds for name in vars(each))
