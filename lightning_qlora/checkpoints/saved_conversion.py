"""What a conversion did, and what the base model was: one entry of a state dict, read from files of strangers."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.adapters.base_compatibility import Quantization, read_quantization
from lightning_qlora.checks import (
    DAMAGED,
    RemovedStartError,
    check_bool,
    check_choice,
    check_integer,
    check_token_indices,
    refuse_unknown_arguments,
    shown,
)
from lightning_qlora.config import QLoRAConfig, arguments_that
from lightning_qlora.files.lightning_checkpoint import check_dense
from lightning_qlora.layers.names import join, last_part, owner_name, parameter_name, without_wrappers
from lightning_qlora.survey.records import CONVERSION

DESCRIPTION_TYPES: dict[str, Any] = {  # types of entries of `describe_base`; of a list, those of its elements are texts
    "prefix": str,
    "trained_in_full": list,
    "task_type": str | None,
    "base_model": str | None,
    "fan_in_fan_out": bool,
    "target_modules": str | list,
    "layers": dict,
    "experts": dict,
    "parameters": list,
    "tokens": dict,
}
OF_LAYERS = (*arguments_that("of_layer"), "init_lora_weights", "loftq_config")  # what "layers" has
PAGE = 4096  # bytes: the JSON is padded, because a sharded checkpoint loads into tensors of the same size


@dataclass(frozen=True)
class SavedConversion:
    """What a checkpoint says about the conversion and the base.

    Attributes:
        config: The arguments.
        base: What `describe_base` returns.
        fingerprints: Name of a 4-bit layer, or of another frozen parameter, that is not in the state dict -> its
            fingerprint.
    """

    config: QLoRAConfig
    base: dict[str, Any]
    fingerprints: dict[str, int]

    def text(self) -> str:
        """It as JSON. Fingerprints are decimal digits: a mean over several bases is a text with other digits."""
        fingerprints = {name: f"{number:019}" for name, number in self.fingerprints.items()}
        return json.dumps({"config": _in_files(self.config), "base": self.base, "fingerprints": fingerprints})

    @classmethod
    def from_text(cls, text: str, own: QLoRAConfig | None = None) -> "SavedConversion":
        """The reverse; a damaged text may raise any error. `own`: checked arguments, which the text may have."""
        content = json.loads(text)
        if own is not None and json.dumps(content["config"]) == json.dumps(_in_files(own)):
            config = own
        else:
            config = _config(content["config"] | {"adapter": None})
        base = {**content["base"]}
        for name, expected in DESCRIPTION_TYPES.items():
            value = base.get(name)
            texts = value if isinstance(value, list) else []
            if name in base and not (isinstance(value, expected) and all(isinstance(text, str) for text in texts)):
                raise TypeError(f"{name}={shown(value)}: must be a {getattr(expected, '__name__', expected)}.")
        layers = base.get("layers", {})
        for arguments in {json.dumps(value): value for value in layers.values()}.values():  # each once
            refuse_unknown_arguments(arguments, OF_LAYERS)
            _config(arguments)
        base["layers"] = {name: _without_removed(arguments) for name, arguments in layers.items()}
        stacks = base.get("experts", {})
        for number, wrappers, transposed, swapped, flat in stacks.values():
            check_integer("experts", number, at_least=1)
            check_choice("wrappers of experts", wrappers, (*range(len(stacks)),))
            for flag in (transposed, swapped, flat):
                check_bool("a property of experts", flag)
        for indices in base.get("tokens", {}).values():
            check_token_indices("tokens", indices)
        fingerprints = {name: int(digits) for name, digits in content["fingerprints"].items()}
        saved = cls(config, base, fingerprints)
        _ = saved.quantization  # it raises for a damaged one
        return saved

    def with_names(self, rename: Callable[[str], str | None]) -> "SavedConversion":
        """It with other names in the module; None: of a tensor that is not in it."""
        names = {name: rename(without_wrappers(name)) for name in self.fingerprints}
        fingerprints = {new: self.fingerprints[name] for name, new in names.items() if new is not None}
        return replace(self, fingerprints=fingerprints)

    @cached_property
    def quantization(self) -> Quantization | None:
        return read_quantization(self.base.get("quantization"), "quantization", self.config)

    def arguments_of_layers(self, state_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Name of each layer with an adapter in a state dict -> its arguments that differ from those of the module."""
        prefix = self.base.get("prefix", "")
        arguments = {join(prefix, name): value for name, value in self.base["layers"].items()}
        found = {}
        for key, name in self.names_of_layers(state_dict).items():
            rank = state_dict[f"{key}lora_A"].shape[-2]
            found[name] = {"r": self.config.r} | arguments.get(name, {})
            r = found[name]["r"]
            if r != rank:
                raise ValueError(f"{key}lora_A: has rank {rank}, and the arguments have r={r}. {DAMAGED}")
        return found

    def names_of_layers(self, state_dict: Mapping[str, Any], root: str = "") -> dict[str, str]:
        """Beginning of the keys of each layer with an adapter in a state dict -> its name, or that of its parameter.

        `root`: what the keys of the converted module begin with.
        """
        outer = join(without_wrappers(root).removesuffix("."), self.base.get("prefix", ""))
        in_full = {join(outer, name) for name in self.base.get("trained_in_full", [])}
        names = {}
        for key in adapter_keys(state_dict):
            name = without_wrappers(owner_name(key))
            if name not in in_full:
                dimensions = len(state_dict[key].shape)
                if dimensions not in (2, 3):
                    raise ValueError(f"{key}: has {dimensions} dimensions, and must have 2 or 3. {DAMAGED}")
                if dimensions == 3:
                    name = parameter_name(name)
                names[key.removesuffix("lora_A")] = name
        return names


def _in_files(config: QLoRAConfig) -> dict[str, Any]:
    return vars(config) | {"adapter": None}  # a folder that is read once, at conversion


def _config(arguments: Mapping[str, Any]) -> QLoRAConfig:
    return QLoRAConfig(**_without_removed(arguments))


def _without_removed(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "loftq_config"}


def adapter_keys(state_dict: Iterable[str]) -> list[str]:
    """The keys of lora_A of each adapter in a state dict, and of parameters of the user that are called so."""
    return [key for key in state_dict if last_part(str(key)) == "lora_A"]


def entry_of(text: str) -> Tensor:
    """The value of `CONVERSION` in a state dict: bytes of a text, in 64 bits.

    A sum over state dicts fits, and averages leave it alone: they know counters of this type.
    """
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % PAGE)
    return torch.frombuffer(bytearray(encoded), dtype=torch.uint8).long()


def text_of(entry: Tensor) -> str:
    if isinstance(entry, Tensor):
        check_dense("it", entry)
    # contiguous() loads the tensors of Lightning's lazily loaded checkpoints.
    encoded = entry.contiguous().double().round().to(torch.uint8)
    return bytes(encoded.tolist()).decode().rstrip()


def read_conversion(
    state_dict: Mapping[str, Any], prefix: str = "", own: QLoRAConfig | None = None
) -> SavedConversion | None:
    """The conversion in a state dict; None for that of a module that is not converted. ValueError if it is damaged."""
    key = prefix + CONVERSION
    if key not in state_dict:
        return None
    try:
        return SavedConversion.from_text(text_of(state_dict[key]), own)
    except RemovedStartError as error:
        raise ValueError(f"{key}: {error}") from None
    except Exception as error:  # a damaged value may raise any error
        raise ValueError(
            f"{key}: is damaged, or of a newer version of lightning-qlora ({error}). Use another copy, or that version."
        ) from error
