"""The modules in a module by their names, from one walk over it: what a conversion, a save and a load ask for."""

from collections.abc import Collection, Iterable
from contextlib import suppress
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch
from lightning.fabric.wrappers import _FabricModule
from torch import nn
from torchmetrics import Metric

from lightning_qlora.checks import NOT_FINITE
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import (
    CHECKPOINTED,
    COMPILED,
    inside,
    is_transformers_model,
    join,
    last_part,
    only_child_of,
    tensors_of,
    without_wrappers,
)
from lightning_qlora.layers.with_adapter import WithAdapter
from lightning_qlora.lightning_copies import classes
from lightning_qlora.survey.records import OF_LAYERS, unchanged_fingerprints
from lightning_qlora.tensors.device_types import IN_16_BITS
from lightning_qlora.tensors.dtensor import is_sharded, local, of_all_ranks
from lightning_qlora.tensors.held_types import TYPES

OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_projection")  # for models without get_output_embeddings
# For a token, the logits, their log-softmax in fp32 and its gradient take 10 to 12 bytes * out_features, and a
# transformer layer about 34 bytes * in_features (Korthikanti et al. 2022), or 2 with gradient checkpointing. From four
# times in_features, that is more than a tenth of a step for up to 12 layers, or for any number with checkpointing.
WIDE = 4


class Traits(NamedTuple):
    """Whether modules have what steps of a conversion are for."""

    is_new: bool = False  # no layer of this package, and no mark
    is_meta: bool = False  # a value on the meta device
    has_16_bits: bool = False  # a type of 16 bits: of a value, of a 4-bit weight before, or of a computation
    is_wide: bool = False  # a wide linear layer


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
        if "_forward_module" in module._modules and isinstance(module, classes(_FabricModule)):
            module = module.module
        return cls(module.named_modules(remove_duplicate=False), wrappers)

    @cached_property
    def traits(self) -> Traits:
        """Those that the modules had at the first use."""
        tensors = [tensor for _, tensor in tensors_of(self.named)]
        types = {tensor.dtype for tensor in tensors} | {layer.dtype_before for layer in self.layers.values()}
        is_held = any(TYPES in vars(part) for part in self.modules)
        marked = any(key.startswith("_qlora_") for part in self.modules for key in vars(part))
        return Traits(
            is_new=not (marked or self.adapters),
            is_meta=any(tensor.is_meta for tensor in tensors),
            has_16_bits=is_held or not types.isdisjoint(IN_16_BITS),
            is_wide=any(map(is_wide, self.modules)),
        )

    def inference_mode(self) -> torch.inference_mode:
        """Inference mode if a module was made in it, else none: a parameter that is made in it can never train."""
        values = (value for part in self.modules for value in part._parameters.values() if value is not None)
        return torch.inference_mode(any(value.is_inference() for value in values))

    @cached_property
    def adapters(self) -> dict[str, WithAdapter]:
        """Name -> what has an adapter, each once: layers, stacks of experts, and embeddings of which rows train."""
        return {part.reported_name(name): part for name, part in self.named if isinstance(part, WithAdapter)}

    def check_adapters_finite(self) -> None:
        """Raise ValueError if an adapter holds NaN or Inf; all ranks of a sharded module must call it.

        Such adapters are neither saved nor merged: the model would compute NaN, and readers refuse the file.
        """
        parameters = {name: adapter.adapter_parameters() for name, adapter in self.adapters.items()}
        bad = [name for name, own in parameters.items() if not all(local(p.detach()).isfinite().all() for p in own)]
        if any(map(is_sharded, chain.from_iterable(parameters.values()))):
            bad = list(dict.fromkeys(chain.from_iterable(of_all_ranks(bad))))
        if bad:
            trainer = vars(self.root).get("_trainer")  # of a LightningModule
            step = ""
            if trainer is not None:
                step = f" after step {trainer.global_step}"
            raise ValueError(
                f"{bad[0] or type(self.root).__name__}: its adapter {NOT_FINITE}{step}, as those of {len(bad)} of "
                f"{len(parameters)} layers: the training diverged. Nothing was written, and earlier files stay. Go on "
                "from an earlier checkpoint, with a smaller learning rate, or compute_dtype='bf16' in place of fp16; "
                "look for NaN in the batches."
            )

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
        if self.base_name or any(COMPILED in name or CHECKPOINTED in name for name, _ in self.places):
            return self.part(self.base_name)
        return self

    def part(self, outer: str) -> "Parts":
        return Parts(self.inside(outer), (COMPILED, CHECKPOINTED))

    def inside(self, outer: str) -> list[tuple[str, nn.Module]]:
        start = len(outer) + bool(outer)
        return [(name[start:], module) for name, module in self.places if inside(name, outer)]

    @cached_property
    def outside_metrics(self) -> "Parts":
        """Without networks that measure and are in nothing else: they say nothing about the values of the others."""
        metrics = [name for name, module in self.places if name and isinstance(module, Metric)]
        if not metrics:
            return self
        return Parts([place for place in self.places if not any(inside(place[0], name) for name in metrics)], ())

    @cached_property
    def output_embeddings(self) -> set[int]:
        """Ids of the output embeddings, if these layers are linear: their models say so, or their names."""
        by_name = {id(module) for name, module in self.named if last_part(name) in OUTPUT_EMBEDDINGS}
        return by_name | self.heads_of_models

    @cached_property
    def heads_of_models(self) -> set[int]:
        """Ids of those that models name."""
        found: set[int] = set()
        for model in self.modules:
            if callable(getattr(model, "get_output_embeddings", None)):
                with suppress(NotImplementedError, AttributeError):  # transformers models without a head
                    found.add(id(model.get_output_embeddings()))  # type: ignore[operator]
        return found - {id(None)}

    @cached_property
    def models(self) -> dict[str, list[nn.Module]]:
        """Name of each transformers model -> the modules in it, itself first."""
        names = [name for name, module in self.named if is_transformers_model(module)]
        return {name: [module for _, module in self.inside(name)] for name in names}


def is_wide(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and layer.out_features >= WIDE * layer.in_features
