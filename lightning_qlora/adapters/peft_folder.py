"""PEFT's adapter folder, written and read: `adapter_config.json` and `adapter_model.safetensors`.

The metadata of the latter have two entries that PEFT ignores: what the base was, and checksums of all else in the file.

Source of the format: peft/utils/save_and_load.py (0.17 to 0.21).
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import ADAPTER_DTYPES, MAGNITUDE, PREFIX, Adapter, State, check_state
from lightning_qlora.adapters.base_compatibility import read_quantization, required_base, subtract_initial
from lightning_qlora.adapters.peft_config import CONFIG_FILE, MERGE_IN_PEFT, read_peft_config
from lightning_qlora.checks import DAMAGED, DIVERGED, shown
from lightning_qlora.config import Base
from lightning_qlora.files.folder_writer import atomic_files
from lightning_qlora.files.hub import file_in
from lightning_qlora.files.safetensors_folder import open_safetensors, parse_json, write_safetensors
from lightning_qlora.layers.names import DELTA, TOKEN_ADAPTER, check_keys, last_part, named
from lightning_qlora.tensors.fingerprint import checksum

WEIGHTS_FILE = "adapter_model.safetensors"
# JSON in the metadata: how the base was quantized and the adapters were initialized (`Quantization`), and
# fingerprints of the 4-bit weights that the checkpoint held.
BASE = "lightning_qlora"
CHECKSUMS = "lightning_qlora_checksums"
METADATA_KEY = "__metadata__"  # safetensors' name of the metadata: the key of their own checksum


def write_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """Write PEFT's two files, each by a rename (`atomic_files`); ValueError if PEFT has no such adapter."""
    if adapter.no_place:
        raise ValueError(adapter.no_place)
    tensors = dict(adapter.saved)
    for name, state in adapter.layers.items():
        for part, value in state.items():
            key = f"{name}.{part}"
            tensors[key if part == MAGNITUDE else f"{key}.weight"] = value
    # clone: safetensors refuses tensors that share memory, as the two names of a tied weight do.
    tensors = {PREFIX + key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    fingerprints = {name: number for name, number in adapter.fingerprints.items() if name in adapter.bases}
    base: dict[str, Any] = {"quantization": None, "fingerprints": fingerprints}
    if adapter.quantization is not None:
        base["quantization"] = adapter.quantization.entry()
    metadata = {"format": "pt", BASE: json.dumps(base, sort_keys=True)}
    metadata[CHECKSUMS] = json.dumps(_checksums(tensors, metadata), sort_keys=True)
    with atomic_files(Path(folder)) as partial:
        write_safetensors(tensors, partial / WEIGHTS_FILE, metadata)
        (partial / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2) + "\n")


def read_adapter(folder: str | os.PathLike[str], base: Base = "quantized") -> Adapter:
    """Read a folder that PEFT or `write_adapter` wrote, for this base model.

    FileNotFoundError if a file is missing; ValueError, with file and key, if one is broken, QLoRALinear does not
    compute this kind of adapter, or it does not fit this base.
    """
    weights_file = file_in(Path(folder), WEIGHTS_FILE)
    config = read_peft_config(file_in(Path(folder), CONFIG_FILE))
    if not weights_file.is_file():
        raise FileNotFoundError(f"{weights_file}: no such file. Save the adapter with safetensors (PEFT's default).")
    with open_safetensors(weights_file) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
        metadata = file.metadata() or {}
    with named(weights_file):
        check_keys(tensors)
        _check_sums(tensors, metadata)
        layers, saved = _layers_and_saved(tensors)
        trained = _entry(metadata, BASE)
        for name, value in trained.items():
            if not isinstance(value, dict | None):
                raise ValueError(f"its metadata {BASE!r} has {shown(name)}: {shown(value)}. {DAMAGED}")
        tokens = _tokens(config.get("trainable_token_indices"), saved)
        if tokens:
            config["trainable_token_indices"] = tokens
        adapter = Adapter(
            config=config,
            layers=layers,
            saved=saved,
            quantization=read_quantization(trained.get("quantization"), f"its metadata {BASE!r}"),
            fingerprints=trained.get("fingerprints") or {},
            source=str(weights_file),
        )
        _check_layers(adapter)
    if base == "float" and required_base(adapter.quantization) is not None:
        layers = subtract_initial(adapter.layers, adapter.source)
        return replace(adapter, layers=layers, quantization=None, fingerprints={})
    return adapter


def _entry(metadata: dict[str, str], key: str) -> dict[str, Any]:
    """An object that `write_adapter` stored; empty if the file does not have it."""
    return parse_json(metadata[key], f"its metadata {key!r}") if key in metadata else {}


def _check_sums(tensors: State, metadata: dict[str, str]) -> None:
    """Raise ValueError, with the key, if a tensor is missing, or one or the metadata has another checksum."""
    expected = _entry(metadata, CHECKSUMS)
    if not expected:
        return
    others = {key: text for key, text in metadata.items() if key != CHECKSUMS}
    checksums = _checksums(tensors, others)
    for key in sorted(expected.keys() | checksums.keys()):
        if expected.get(key) != checksums.get(key):
            difference = f"(its checksum is {checksums.get(key)}, and was {expected.get(key)})"
            raise ValueError(f"{key!r} is not what was saved {difference}. {DAMAGED}")


def _checksums(tensors: State, metadata: dict[str, str]) -> dict[str, str]:
    text = json.dumps(metadata, sort_keys=True)
    values = tensors | {METADATA_KEY: torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")}
    return {key: checksum(value) for key, value in values.items()}


def _layers_and_saved(tensors: State) -> tuple[dict[str, State], State]:
    """The tensors of each layer by PEFT's name of it, and the other ones by their names."""
    adapted = {key.partition(".lora_A")[0] for key in tensors if ".lora_A" in key}
    layers: dict[str, State] = {}
    saved = {}
    for key, tensor in tensors.items():
        # PEFT also writes the base weights of adapted output embeddings and of embeddings with rows that train. They
        # are not trained, and have another shape after resizing: those of the base model are used.
        owner, base_layer, _ = key.partition(".base_layer.")
        if base_layer and (owner in adapted or last_part(owner) == TOKEN_ADAPTER) and ".lora_" not in key:
            continue
        if not key.startswith(PREFIX):
            raise ValueError(f"key {key!r} does not begin with {PREFIX!r}, so PEFT would not read it either.")
        name = key.removeprefix(PREFIX)
        match = re.fullmatch(rf"(.+)\.(lora_A|lora_B|{MAGNITUDE})(\.default)?(\.weight)?", name)
        if match:
            state = layers.setdefault(match[1], {})
            if match[2] in state:
                raise ValueError(f"key {key!r}: the file has a second {match[2]} of {match[1]}. {DAMAGED}")
            state[match[2]] = tensor
        elif ".lora_" in name:
            raise ValueError(
                f"key {key!r}: only lora_A, lora_B and {MAGNITUDE} of linear layers can be read. {MERGE_IN_PEFT}"
            )
        else:
            _check_saved(key, name, tensor)
            saved[name] = tensor
    if not layers:
        raise ValueError(f"holds no lora_A and lora_B. {DAMAGED}")
    return layers, saved


def _check_saved(key: str, name: str, tensor: Tensor) -> None:
    if "." not in name:
        raise ValueError(f"key {key!r} is in no module, and modules_to_save names modules. {DAMAGED}")
    if tensor.dtype not in ADAPTER_DTYPES and (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"key {key!r} is {tensor.dtype}, and must be float16, bfloat16, float32 or float64. {DAMAGED}")
    if tensor.isnan().any():  # a mask may hold Inf
        raise ValueError(f"key {key!r} holds NaN. {DIVERGED}")


def _check_layers(adapter: Adapter) -> None:
    """Refuse layers of another rank or kind than in the config: the two files are not of one adapter."""
    config = adapter.config
    for name, state in adapter.layers.items():
        key = f"key '{PREFIX}{name}.lora_A.weight':"
        check_state(key, state)
        pairs: dict[str, tuple[int, set[Any]]] = {"use_dora": (MAGNITUDE in state, {config["use_dora"]})}
        if not adapter.target_parameters:  # for these PEFT has the ranks of all experts in one matrix
            pairs["rank"] = len(state["lora_A"]), adapter.ranks
        for argument, (value, allowed) in pairs.items():
            if value not in allowed:
                words = ", ".join(map(str, sorted(allowed)))
                raise ValueError(
                    f"{key} the file has {argument}={value} there, and {CONFIG_FILE} has {words}. They are not of one "
                    "adapter: copy or save both again."
                )


def _tokens(entry: Any, saved: State) -> dict[str, list[int]]:
    """Name of each embedding with rows -> their indices; `entry`: trainable_token_indices, by endings of names."""
    by_ending = entry if isinstance(entry, dict) else {"": entry}  # for any embedding
    tokens = {}
    for key, rows in saved.items():
        name = key.removesuffix(f".{DELTA}")
        if name == key:
            continue
        matches = [indices for end, indices in by_ending.items() if name.endswith(end)]
        if name in by_ending:
            matches = [by_ending[name]]
        if len(matches) != 1 or matches[0] is None or rows.ndim != 2 or len(rows) != len(matches[0]):
            shape = list(rows.shape)
            raise ValueError(
                f"key '{PREFIX}{key}' has shape {shape}: it must have one row for each index in "
                f"{_rule(entry)}. {DAMAGED}"
            )
        tokens[name] = matches[0]
    if any(by_ending.values()) and not tokens:  # PEFT writes those of tied weights once
        raise ValueError(f"has no rows for {_rule(entry)}. {DAMAGED}")
    return tokens


def _rule(entry: Any) -> str:
    return f"trainable_token_indices, {shown(entry)} in {CONFIG_FILE}"
