"""A folder of weights, read by the names of the model's parameters, and written with the names of the folder.

transformers renames and converts tensors while it loads them (conversion_mapping.py), and back when it saves:

    language_model.model.layers.0.mlp.up_proj.weight     model.language_model.layers.0.mlp.up_proj.weight
    encoder.layers.0.attn.Wqkv.weight                    encoder.layers.0.self_attn.q_proj.weight, k_proj, v_proj
    layers.0.mlp.experts.3.gate_proj.weight, up_proj     layers.0.mlp.experts.gate_up_proj, expert 3

Its own functions do both here, so this file has no names of architectures.
Source: transformers 5, core_model_loading.py (convert_and_load_state_dict_in_model, revert_weight_conversion).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.adapters.dequantized_folder import open_dense
from lightning_qlora.files.safetensors_folder import TensorEntry, WeightFolder
from lightning_qlora.layers.dotted_names import owner_name
from lightning_qlora.layers.kinds import kind_of

OUTPUT = "lm_head.weight"  # the output embedding; config.json says whether it is tied


@dataclass
class Conversion:
    """Tensors of a folder that become other parameters while the model loads.

    Attributes:
        model: The model, on the meta device.
        transform: transformers' WeightConverter.
        first: Name of its first parameter.
        sources: Pattern of the transform -> keys in the folder that match it, in order.
        expert: Number of the expert that the keys belong to, if the transform stacks experts. Then the parameters are
            named `NAME.expert`, and lack the dimension of experts.
        places: Name that the reverse transform gives a tensor -> pattern, and index of its key in `sources`; None if
            transformers can't reverse the transform.
        names: Names of the parameters.
    """

    model: Any
    transform: Any
    first: str
    sources: dict[str, list[str]]
    expert: int | None = None
    places: dict[str, tuple[str, int]] | None = None
    names: list[str] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """All keys in the folder."""
        return [key for keys in self.sources.values() for key in keys]

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Key -> tensor of the folder, to name -> parameter of the model."""
        transform = deepcopy(self.transform)
        for pattern, keys in self.sources.items():
            for key in keys:
                transform.add_tensor(self.first, key, pattern, tensors[key])
        made = self._run(transform, self.first)
        return made if self.expert is None else {f"{name}.{self.expert}": value[0] for name, value in made.items()}

    def restore(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> parameter of the model, to key -> tensor of the folder."""
        assert self.places is not None
        made = self._reverse(parameters)
        return {self.sources[pattern][i]: made[name].contiguous() for name, (pattern, i) in self.places.items()}

    def find_places(self, shapes: Mapping[str, Tensor]) -> None:
        """Convert tensors on the meta device and restore them, to know which restored tensor belongs to which key."""
        by_name = import_module("transformers.core_model_loading").dot_natural_key
        try:
            restored = self._reverse(self.convert(shapes))
        except (NotImplementedError, ValueError, KeyError, AttributeError, TypeError, RuntimeError):
            return
        places: dict[str, tuple[str, int]] = {}
        for name in sorted(restored, key=by_name):
            pattern = self.transform.rename_source_key(name)[1]
            places[name] = pattern, sum(other == pattern for other, _ in places.values())
        keys = {(pattern, i): key for pattern, keys in self.sources.items() for i, key in enumerate(keys)}
        if set(places.values()) == keys.keys() and all(
            restored[name].shape == shapes[keys[place]].shape for name, place in places.items()
        ):
            self.places = places

    def _reverse(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        transform, first = self.transform.reverse_transform(), ""
        for name, value in parameters.items():
            if self.expert is not None:
                name, value = owner_name(name), value[None]
            first, pattern = transform.rename_source_key(name)
            transform.add_tensor(first, name, pattern, value)
        return self._run(transform, first)

    def _run(self, transform: Any, first: str) -> dict[str, Tensor]:
        made = transform.convert(first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class ModelFolder(WeightFolder):
    """A folder whose entries have the names of the model's parameters, where transformers can make that model.

    Tensors that the model does not use, and 4-bit weights that it would have to convert, keep their keys. Raises as
    `WeightFolder`; also ValueError if two tensors become one parameter.

    Attributes:
        model: The model, on the meta device; None: every name is a key.
        stored: The folder with its own keys.
        key_of: Name -> key in the folder, of tensors that are only renamed.
        conversions: Name -> conversion that makes this parameter.
    """

    def __init__(self, folder: str | os.PathLike[str], model: nn.Module | None) -> None:
        self.model = model
        self.stored = WeightFolder(folder) if model is None else open_dense(Path(folder), model)
        self.folder, self.key_of, self.conversions = self.stored.folder, dict[str, str](), dict[str, Conversion]()
        found = self._match(model)
        converted = {key for conversion in found for key in conversion.keys}
        if twice := self.stored.entries.keys() - set(self.key_of.values()) - converted:
            raise ValueError(f"{self.folder}: {min(twice)!r} and another tensor are the same parameter of the model.")
        self.entries = {name: self.stored.entries[key] for name, key in self.key_of.items()}
        self.file_of = {name: self.stored.file_of[key] for name, key in self.key_of.items()}
        for conversion in found:
            key = conversion.keys[0]
            for name, value in conversion.convert(self._shapes(conversion)).items():
                conversion.names.append(name)
                self.conversions[name], self.file_of[name] = conversion, self.stored.file_of[key]
                self.entries[name] = TensorEntry(self.stored.entries[key].dtype, tuple(value.shape))

    @staticmethod
    def open(folder: str | os.PathLike[str]) -> "ModelFolder":
        """A folder with the model of its config.json, or with None where transformers can't make that model."""
        model = None
        if (Path(folder) / "config.json").is_file():
            with suppress(ValueError):
                model = empty_model(Path(folder), "the names of its tensors")
        return ModelFolder(folder, model)

    def units(self) -> Iterator[list[str]]:
        """Names that are written together, in the order of files: one, or the parameters of a conversion."""
        for path in self.files():
            for name in [name for name, file in self.file_of.items() if file == path]:
                conversion = self.conversions.get(name)
                if conversion is None:
                    yield [name]
                elif name == conversion.names[0]:
                    yield conversion.names

    def tensors(self, keys: list[str]) -> dict[str, Tensor]:
        """Read parameters to the CPU, by their names."""
        stored = self.stored.tensors([key for name in keys for key in self._stored_keys(name)])
        of_name = {name: self.conversions.get(name) for name in keys}
        return {
            name: stored[self.key_of[name]] if c is None else c.convert(stored)[name] for name, c in of_name.items()
        }

    def _stored_keys(self, name: str) -> list[str]:
        conversion = self.conversions.get(name)
        return [self.key_of[name]] if conversion is None else conversion.keys

    def where(self, name: str) -> str:
        """File and keys of a parameter, for messages."""
        return f"{self.file_of[name]}: {', '.join(map(repr, self._stored_keys(name)))}"

    def is_transposed(self, key: str, adapter: Adapter, layer: str | None) -> bool:
        """Whether a weight is [in, out] in the dense model: as the model says, else as the layer's adapter does."""
        if self.model is not None:
            with suppress(AttributeError):
                return kind_of(type(self.model.get_submodule(key.removesuffix(".weight")))).transposed
        if layer is None or self.is_packed(key):  # in 4 bits it is [out, in]
            return adapter.fan_in_fan_out and not key.endswith(OUTPUT)
        inputs, outputs = adapter.layers[layer].lora_A.shape[1], adapter.layers[layer].lora_B.shape[0]
        return self.entries[key].shape == (inputs, outputs) and (inputs != outputs or adapter.fan_in_fan_out)

    def _match(self, model: Any) -> list[Conversion]:
        """Fill `key_of`, and return the conversions."""
        if model is None or find_spec("transformers.conversion_mapping") is None:
            self.key_of = {key: key for key in self.stored.entries}
            return []
        loading = import_module("transformers.core_model_loading")
        mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
        of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        parameters, made = model.state_dict(), dict[str, Conversion]()
        parameter_of = getattr(self.stored, "parameter_of", {})
        known = model.base_model_prefix, parameters  # not by keyword: transformers 5.3 calls the first one `prefix`
        for key in sorted(self.stored.entries, key=loading.dot_natural_key):
            head, companion, _ = key.partition(".weight.")  # such as the scales of a 4-bit weight
            weight = f"{head}.weight" if companion and self.stored.is_packed(f"{head}.weight") else key
            name, pattern = loading.rename_source_key(weight, renamings, converters, *known)
            if name not in parameters and weight in parameters:
                name, pattern = loading.rename_source_key(weight, [], [], *known)
            if name not in parameters or (pattern is not None and self.stored.is_packed(weight)):
                self.key_of[key] = key
                continue
            parameter_of[key] = name, pattern is not None
            if pattern is None:
                self.key_of[name + key[len(weight) :]] = key
            else:
                converted = made.setdefault(name, Conversion(model, of_pattern[pattern], name, {}))
                converted.sources.setdefault(pattern, []).append(key)
        return [part for conversion in made.values() for part in self._parts(conversion, loading.MergeModulelist)]

    def _parts(self, conversion: Conversion, merge_experts: type) -> list[Conversion]:
        """A conversion that stacks experts, as one for each expert: so memory holds one of them at a time."""
        numbers = {len(keys) for keys in conversion.sources.values()}
        operation: Any = conversion.transform.operations[0]
        parts = [conversion]
        if isinstance(operation, merge_experts) and getattr(operation, "dim", None) == 0 and len(numbers) == 1:
            parts = [
                replace(
                    conversion, sources={p: [keys[i]] for p, keys in conversion.sources.items()}, expert=i, names=[]
                )
                for i in range(numbers.pop())
            ]
        parts[0].find_places(self._shapes(parts[0]))
        return [replace(part, places=parts[0].places) for part in parts]

    def _shapes(self, conversion: Conversion) -> dict[str, Tensor]:
        entries = {key: self.stored.entries[key] for key in conversion.keys}
        return {key: torch.empty(entry.shape, device="meta") for key, entry in entries.items()}


def empty_model(folder: Path, what_for: str) -> nn.Module:
    """The transformers model that a folder's config.json names, on the meta device: its layers without weights.

    ValueError if transformers is not installed, or has no such model; it says what for the model is needed.
    """
    try:
        import transformers

        config: Any = transformers.AutoConfig.from_pretrained(folder)
        kind: Any = getattr(transformers, config.architectures[0])
        with torch.device("meta"):
            model: nn.Module = kind._from_config(config)
    except Exception as error:  # any error of the model's own code
        why = next(iter(str(error).splitlines()), type(error).__name__)[:240]
        raise ValueError(
            f"{folder / 'config.json'}: transformers can't make a model of it ({why}), and only that says {what_for}."
        ) from error
    return model
