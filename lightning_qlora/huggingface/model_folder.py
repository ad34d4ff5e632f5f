"""A folder of weights, read by the names of the model's parameters.

transformers renames and converts tensors while it loads them (conversion_mapping.py):

    language_model.model.layers.0.mlp.up_proj.weight     model.language_model.layers.0.mlp.up_proj.weight
    encoder.layers.0.attn.Wqkv.weight                    encoder.layers.0.self_attn.q_proj.weight, k_proj, v_proj
    layers.0.mlp.experts.3.gate_proj.weight, up_proj     layers.0.mlp.experts.gate_up_proj, expert 3

Here its own functions do the same, so this file contains no names of architectures.
Source: transformers 5, core_model_loading.py (convert_and_load_state_dict_in_model).
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.files.safetensors_folder import TensorEntry, WeightFolder
from lightning_qlora.huggingface.model_config import model_without_values, read_model_config


@dataclass
class TensorGroup:
    """Tensors of a folder that become other parameters while the model loads.

    The keys may belong to one expert of those that the transform stacks. Then the parameters are named `NAME.expert`,
    and lack the dimension of experts.
    """

    model: Any  # on the meta device
    transform: Any  # transformers' WeightConverter
    first: str  # name of its first parameter
    sources: dict[str, list[str]]  # pattern of the transform -> keys in the folder that match it, in order
    expert: int | None = None

    @property
    def keys(self) -> list[str]:
        return [key for keys in self.sources.values() for key in keys]

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert `tensors`, by keys of the folder, to parameters by names of the model."""
        transform = deepcopy(self.transform)
        for pattern, keys in self.sources.items():
            for key in keys:
                transform.add_tensor(self.first, key, pattern, tensors[key])
        converted = transform.convert(self.first, model=self.model, config=self.model.config)
        parameters = {name: single_tensor(value) for name, value in converted.items()}
        if self.expert is None:
            return parameters
        return {f"{name}.{self.expert}": tensor[0] for name, tensor in parameters.items()}


def single_tensor(value: Any) -> Tensor:
    """A tensor that transformers may pass in a list of one."""
    if isinstance(value, list):
        value = value[0]
    return value  # type: ignore[no-any-return]


class ModelFolder(WeightFolder):
    """A folder whose entries have the names of the model's parameters, if transformers can build that model.

    Tensors that the model does not use keep their keys. Raises as `WeightFolder`; also ValueError if two tensors become
    one parameter.

    Attributes:
        model: The model, on the meta device; None: every name is a key.
        key_of: Name -> key in the folder, of tensors that are only renamed.
        groups: Name -> the tensors that this parameter is made from.
    """

    def __init__(self, folder: str | os.PathLike[str], model: nn.Module | None) -> None:
        self.model = model
        self.stored = WeightFolder(folder)  # with its own keys
        self.folder = self.stored.folder
        self.key_of: dict[str, str] = {}
        self.groups: dict[str, TensorGroup] = {}
        groups = self._match(model)
        converted = {key for group in groups for key in group.keys}
        twice = self.stored.entries.keys() - set(self.key_of.values()) - converted
        if twice:
            raise ValueError(f"{self.folder}: {min(twice)!r} and another tensor are the same parameter of the model.")
        self.entries = {name: self.stored.entries[key] for name, key in self.key_of.items()}
        self.file_of = {name: self.stored.file_of[key] for name, key in self.key_of.items()}
        for group in groups:
            first = group.keys[0]
            entries = {key: self.stored.entries[key] for key in group.keys}
            shapes = {key: torch.empty(entry.shape, device="meta") for key, entry in entries.items()}
            for name, value in group.convert(shapes).items():
                self.groups[name] = group
                self.file_of[name] = self.stored.file_of[first]
                self.entries[name] = TensorEntry(self.stored.entries[first].dtype, tuple(value.shape))

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> "ModelFolder":
        """A folder with the model of its config.json, or without one if transformers can't build it."""
        model = None
        with suppress(Exception):  # any error of the model's own code
            config = read_model_config(folder)
            model = model_without_values(config, config.architectures[0])
        return ModelFolder(folder, model)

    def tensors(self, keys: list[str]) -> dict[str, Tensor]:
        stored = self.stored.tensors([key for name in keys for key in self._stored_keys(name)])
        tensors = {}
        for name in keys:
            group = self.groups.get(name)
            if group is None:
                tensors[name] = stored[self.key_of[name]]
            else:
                tensors[name] = group.convert(stored)[name]
        return tensors

    def _stored_keys(self, name: str) -> list[str]:
        group = self.groups.get(name)
        if group is None:
            return [self.key_of[name]]
        return group.keys

    def where(self, name: str) -> str:
        return f"{self.file_of[name]}: {', '.join(map(repr, self._stored_keys(name)))}"

    def _match(self, model: Any) -> list[TensorGroup]:
        if model is None or find_spec("transformers.conversion_mapping") is None:
            self.key_of = {key: key for key in self.stored.entries}
            return []
        loading = import_module("transformers.core_model_loading")
        mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        parameters = model.state_dict()
        groups: dict[str, TensorGroup] = {}  # by the name of the first parameter
        arguments = model.base_model_prefix, parameters  # not by keyword: transformers 5.3 calls the first one `prefix`
        for key in sorted(self.stored.entries, key=loading.dot_natural_key):
            name, pattern = loading.rename_source_key(key, renamings, converters, *arguments)
            if name not in parameters and key in parameters:
                name, pattern = loading.rename_source_key(key, [], [], *arguments)
            if name not in parameters:
                self.key_of[key] = key
            elif pattern is None:
                self.key_of[name] = key
            else:
                group = groups.setdefault(name, TensorGroup(model, of_pattern[pattern], name, {}))
                group.sources.setdefault(pattern, []).append(key)
        return [part for each in groups.values() for part in self._parts(each, loading.MergeModulelist)]

    def _parts(self, group: TensorGroup, merge_experts: Any) -> list[TensorGroup]:
        """Split a group that stacks experts into one per expert, so that memory holds one expert at a time."""
        numbers = {len(keys) for keys in group.sources.values()}
        operation: Any = group.transform.operations[0]
        if not isinstance(operation, merge_experts) or operation.dim != 0 or len(numbers) != 1:
            return [group]
        return [
            replace(group, sources={p: [keys[i]] for p, keys in group.sources.items()}, expert=i)
            for i in range(numbers.pop())
        ]
