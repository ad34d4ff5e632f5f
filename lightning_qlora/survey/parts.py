"""The modules in a module by their names, from one walk over it: what a conversion, a save and a load ask for."""

from collections.abc import Collection, Iterable
from functools import cached_property
from typing import NamedTuple

from lightning.fabric.wrappers import _FabricModule
from torch import nn

from lightning_qlora.dtypes.instance_method import METHODS
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import (
    CHECKPOINTED,
    COMPILED,
    inside,
    is_transformers_model,
    join,
    only_child_of,
    tensors_of,
    without_wrappers,
)
from lightning_qlora.layers.with_adapter import WithAdapter, adapters_of
from lightning_qlora.lightning_copies import classes
from lightning_qlora.survey.records import OF_LAYERS, unchanged_fingerprints
from lightning_qlora.tensors.device_types import IN_16_BITS
from lightning_qlora.tensors.held_types import TYPES


class NamedParameter(NamedTuple):
    name: str
    owner: nn.Module
    key: str
    value: nn.Parameter


class Parts:
    """The modules in a module.

    Attributes:
        places: Name and module, a shared module under each of its names, in the order of `named_modules`, without these
            names of wrappers. State dicts have torch.compile's, and not checkpoint_wrapper's.
        named: The same, each module once.
        modules: The modules of these.
        root: The first one.
    """

    def __init__(self, places: Iterable[tuple[str, nn.Module]], wrappers: Collection[str]) -> None:
        self.places = [*places]
        if wrappers:
            self.places = [(without_wrappers(name, wrappers), module) for name, module in self.places]
        first: dict[int, tuple[str, nn.Module]] = {}
        for name, module in self.places:
            first.setdefault(id(module), (name, module))
        self.named = [*first.values()]
        self.modules = [module for _, module in self.named]
        self.root = self.modules[0]

    @classmethod
    def of(cls, module: nn.Module, wrappers: Collection[str] = (CHECKPOINTED,)) -> "Parts":
        """Those of a module; of a module that Fabric set up, those of the user's module."""
        if isinstance(module, classes(_FabricModule)):
            module = module.module
        return cls(module.named_modules(remove_duplicate=False), wrappers)

    @cached_property
    def is_new(self) -> bool:
        """Whether this package left nothing in the modules: no layer, and no mark on one."""
        return not (self.adapters or any(key.startswith("_qlora_") for part in self.modules for key in vars(part)))

    @property
    def has_16_bits(self) -> bool:
        """Whether a value, a 4-bit weight before, or what a module computes in, has a type of 16 bits."""
        types = {tensor.dtype for _, tensor in tensors_of(self.named)}
        types.update(layer.dtype_before for layer in self.layers.values())
        return not types.isdisjoint(IN_16_BITS) or any({TYPES, METHODS} & vars(part).keys() for part in self.modules)

    @cached_property
    def adapters(self) -> dict[str, WithAdapter]:
        """Name -> what has an adapter, each once: layers, stacks of experts, and embeddings of which rows train."""
        return adapters_of(self.named)

    @cached_property
    def layers(self) -> dict[str, LoRALayer]:
        """The converted layers among them; a stack of experts by the name of its parameter."""
        return {name: part for name, part in self.adapters.items() if isinstance(part, LoRALayer)}

    @cached_property
    def layers_by_key(self) -> dict[str, LoRALayer]:
        """Name -> converted layer, under each of its names in state dicts."""
        return {name: part for name, part in self.places if isinstance(part, LoRALayer)}

    @property
    def rows_that_train(self) -> dict[str, list[int]]:
        """Name of an embedding -> its rows that train; for tied weights the first name only."""
        return {name: part.rows_that_train() for name, part in self.adapters.items() if part.row_count}

    @property
    def parameters(self) -> list[NamedParameter]:
        """The parameters under each of their names; not cached, because conversion frees the weights one by one."""
        return [
            NamedParameter(join(name, key), owner, key, parameter)
            for name, owner in self.places
            for key, parameter in owner._parameters.items()
            if parameter is not None
        ]

    @cached_property
    def dense_parameters(self) -> list[NamedParameter]:
        """Those that no 4-bit layer saves."""
        return [each for each in self.parameters if not (isinstance(each.owner, LoRALayer) and each.key in OF_LAYERS)]

    @cached_property
    def unchanged(self) -> dict[tuple[nn.Module, str], int]:
        """See `records.py`: it reads them all, and of a module that is sharded, all ranks must ask for it."""
        return unchanged_fingerprints(self.named)

    @cached_property
    def base_name(self) -> str:
        """Name of the base model, which PEFT and vLLM load: the transformers model that holds all adapters.

        Else the only child with parameters of a LightningModule, else "", for the module itself.
        """
        adapted = set(self.layers.values())
        for name, modules in self.models.items():
            if adapted.issubset(modules):
                return name
        return only_child_of(self.root) or ""

    @cached_property
    def base(self) -> "Parts":
        """The base model. Its names are those in adapter files, without those of wrappers."""
        return self.part(self.base_name)

    def part(self, outer: str) -> "Parts":
        return Parts(self.inside(outer), (COMPILED, CHECKPOINTED))

    def inside(self, outer: str) -> list[tuple[str, nn.Module]]:
        start = len(outer) + bool(outer)
        return [(name[start:], module) for name, module in self.places if inside(name, outer)]

    @cached_property
    def models(self) -> dict[str, list[nn.Module]]:
        """Name of each transformers model -> the modules in it, itself first."""
        names = [name for name, module in self.named if is_transformers_model(module)]
        return {name: [module for _, module in self.inside(name)] for name in names}
