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

from lightning_qlora.adapters.adapter import ADAPTER_DTYPES, MAGNITUDE, PREFIX, Adapter, LayerAdapter
from lightning_qlora.adapters.base_compatibility import check_quantization
from lightning_qlora.adapters.peft_config import (
    CONFIG_FILE,
    MERGE_IN_PEFT,
    alpha_of_name,
    is_target,
    peft_config,
    read_peft_config,
)
from lightning_qlora.adapters.peft_experts import stack_adapters
from lightning_qlora.checks import shown
from lightning_qlora.files.folder_writer import atomic_files
from lightning_qlora.files.safetensors_folder import open_safetensors, parse_json, write_safetensors
from lightning_qlora.layers.fingerprint import checksum, fingerprint_of_weights
from lightning_qlora.layers.names import last_part, named
from lightning_qlora.layers.trainable_tokens import DELTA, TOKEN_ADAPTER

WEIGHTS_FILE = "adapter_model.safetensors"
# JSON in the metadata: how the base was quantized and the adapters were initialized (`quantization_of`), and
# fingerprints of the 4-bit weights that the initialization changed.
BASE = "lightning_qlora"
CHECKSUMS = "lightning_qlora_checksums"
NOT_FINITE = "holds NaN or Inf: the training diverged, or the file is damaged. Use an adapter that was saved earlier."
METADATA_KEY = "__metadata__"  # safetensors' name of the metadata: the key of their own checksum


def write_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """Write PEFT's two files, each by a rename (`atomic_files`).

    ValueError for experts that have no place there.
    """
    # clone: safetensors refuses tensors that share memory, as the two names of a tied weight do.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in peft_tensors(adapter).items()}
    config = peft_config(adapter)
    with atomic_files(Path(folder)) as partial:
        write_safetensors(tensors, partial / WEIGHTS_FILE, _metadata(adapter, tensors))
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def _metadata(adapter: Adapter, tensors: dict[str, Tensor]) -> dict[str, str]:
    fingerprints = {name: fingerprint_of_weights(weights) for name, weights in adapter.bases.items()}
    if (adapter.quantization or {}).get("base_changed"):
        of_layers = {name: n for name, n in adapter.base_fingerprints.items() if name in adapter.layers}
        fingerprints = of_layers | fingerprints
    base = {"quantization": adapter.quantization, "fingerprints": fingerprints}
    metadata = {"format": "pt", BASE: json.dumps(base, sort_keys=True)}
    metadata[CHECKSUMS] = json.dumps(_checksums(tensors, metadata), sort_keys=True)
    return metadata


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors; ValueError for experts that have no place there."""
    tensors = {PREFIX + name: value for name, value in adapter.saved.items()}
    layers = {name: layer for name, layer in adapter.layers.items() if name not in adapter.experts}
    layers |= adapter.expert_adapters
    layers |= dict(stack_adapters(adapter, name) for name in adapter.experts)
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = layer.magnitude
    return tensors


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read a folder that PEFT or `write_adapter` wrote.

    FileNotFoundError if a file is missing; ValueError, with file and key, if one is broken, or QLoRALinear does not
    compute this kind of adapter.
    """
    weights_file = Path(folder) / WEIGHTS_FILE
    config = read_peft_config(Path(folder) / CONFIG_FILE)
    if not weights_file.is_file():
        raise FileNotFoundError(f"{weights_file}: no such file. Save the adapter with safetensors (PEFT's default).")
    with open_safetensors(weights_file) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
        metadata = file.metadata() or {}
    with named(weights_file):
        return replace(_parse(config, tensors, metadata), source=str(weights_file))


def _entry(metadata: dict[str, str], key: str) -> dict[str, Any] | None:
    """An object that `_metadata` stored; None if the file does not have it."""
    return parse_json(metadata[key], f"its metadata {key!r}") if key in metadata else None


def _check_file(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Raise ValueError, with the key, if a tensor is missing, or one or the metadata has another checksum."""
    expected = _entry(metadata, CHECKSUMS)
    if expected is None:
        return
    checksums = _checksums(tensors, {key: text for key, text in metadata.items() if key != CHECKSUMS})
    for key in sorted(expected.keys() | checksums.keys()):
        if expected.get(key) != checksums.get(key):
            raise ValueError(
                f"{key!r} is not what was saved (its checksum is {checksums.get(key)}, and was "
                f"{expected.get(key)}). The file is damaged: copy it again, or save the adapter again."
            )


def _checksums(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    text = json.dumps(metadata, sort_keys=True)
    checksums = {key: checksum(tensor) for key, tensor in tensors.items()}
    checksums[METADATA_KEY] = checksum(torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu"))
    return checksums


def _parse(config: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str]) -> Adapter:
    _check_file(tensors, metadata)
    adapted = {key.partition(".lora_A")[0] for key in tensors if ".lora_A" in key}
    parts: dict[str, dict[str, Tensor]] = {}
    saved = {}
    for key, tensor in tensors.items():
        # PEFT also writes the base weights of adapted output embeddings and of embeddings with rows that train. They
        # are not trained, and have another shape after resizing: those of the base model are used.
        owner, base_layer, _ = key.partition(".base_layer.")
        if base_layer and (owner in adapted or last_part(owner) == TOKEN_ADAPTER) and ".lora_" not in key:
            continue
        if not key.startswith(PREFIX):
            raise ValueError(f"key {key!r} does not begin with {PREFIX!r}, so PEFT would not read it either.")
        name, part = _split(key)
        if tensor.dtype not in ADAPTER_DTYPES and (part or tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(
                f"key {key!r} is {str(tensor.dtype).removeprefix('torch.')}, and adapters must be float16, "
                "bfloat16, float32 or float64. Save it in one of these types."
            )
        if part is None:
            _check_saved(key, name, tensor)
            saved[name] = tensor
        elif part in parts.setdefault(name, {}):
            raise ValueError(f"key {key!r}: the file has a second {part} of {name}. Save the adapter again.")
        else:
            parts[name][part] = tensor
    if not parts:
        raise ValueError("holds no lora_A and lora_B. Use another copy, or save the adapter again.")
    layers = {name: _layer(name, matrices, config) for name, matrices in parts.items()}
    base = _entry(metadata, BASE) or {}
    for name, value in base.items():
        if not isinstance(value, dict | None):
            raise ValueError(f"its metadata {BASE!r} has {shown(name)}: {shown(value)}. Copy or save it again.")
    quantization = base.get("quantization")
    check_quantization(quantization, f"its metadata {BASE!r}")
    expert_adapters: dict[str, LayerAdapter] = {}
    if config.get("target_parameters"):
        layers, expert_adapters = {}, layers
    return Adapter(
        layers=layers,
        expert_adapters=expert_adapters,
        peft_config=config,
        saved=saved,
        modules_to_save=list(config.get("modules_to_save") or []),
        tokens=_tokens(saved, config),
        target_modules=config.get("target_modules") or sorted(layers),
        use_rslora=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        task_type=config.get("task_type"),
        base_model=config.get("base_model_name_or_path"),
        quantization=quantization,
        base_fingerprints=base.get("fingerprints") or {},
    )


def _split(key: str) -> tuple[str, str | None]:
    """Layer and part ("lora_A", "lora_B", magnitude) of a key, or name of a parameter and None."""
    name = key.removeprefix(PREFIX)
    match = re.fullmatch(rf"(.+)\.(lora_A|lora_B|{MAGNITUDE})(\.default)?(\.weight)?", name)
    if match:
        return match[1], match[2]
    if ".lora_" in name or ".base_layer." in name:
        raise ValueError(
            f"key {key!r}: only lora_A, lora_B and {MAGNITUDE} of linear layers can be read. {MERGE_IN_PEFT}"
        )
    return name, None


def _check_saved(key: str, name: str, tensor: Tensor) -> None:
    """Refuse a value of `modules_to_save` that has no module, or holds NaN; a mask may hold Inf."""
    if "." not in name:
        raise ValueError(f"key {key!r} is in no module, and modules_to_save names modules. Save the adapter again.")
    if torch.isnan(tensor).any():
        raise ValueError(f"key {key!r} {NOT_FINITE}")


def _layer(name: str, parts: dict[str, Tensor], config: dict[str, Any]) -> LayerAdapter:
    a = parts.get("lora_A")
    b = parts.get("lora_B")
    magnitude = parts.get(MAGNITUDE)
    shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
    rule = f"key '{PREFIX}{name}.lora_A.weight': the file has {shapes}, and must have lora_A [r, in], lora_B [out, r]"
    if a is None or b is None or a.ndim != 2 or b.ndim != 2 or not a.numel() * b.numel() or len(a) != b.shape[1]:
        raise ValueError(f"{rule} of a linear layer, of rank 1 or more.")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise ValueError(f"{rule}, and {MAGNITUDE} [out].")
    for part, tensor in parts.items():
        if not torch.isfinite(tensor.float()).all():  # a float64 may be too large for fp32, in which adapters train
            raise ValueError(f"key '{PREFIX}{name}.{part}.weight' {NOT_FINITE}")
    _check_config(name, a, magnitude, config)
    parameter = f"{name}.weight"
    if is_target(config, parameter):
        name = parameter
    return LayerAdapter(a, b, alpha_of_name(config, name), magnitude)


def _check_config(name: str, a: Tensor, magnitude: Tensor | None, config: dict[str, Any]) -> None:
    """Refuse a layer of another rank or kind than those in the config: the two files are not of one adapter."""
    pairs: dict[str, tuple[int, set[int]]] = {"use_dora": (magnitude is not None, {bool(config.get("use_dora"))})}
    if not config.get("target_parameters"):  # for these PEFT has the ranks of all experts in one matrix
        # Any of the ranks: PEFT writes the patterns in another order.
        pairs["rank"] = len(a), {config["r"], *(config.get("rank_pattern") or {}).values()}
    for key, (value, allowed) in pairs.items():
        if value not in allowed:
            raise ValueError(
                f"key '{PREFIX}{name}.lora_A.weight': the file has {key}={value} there, and {CONFIG_FILE} has "
                f"{', '.join(map(str, sorted(allowed)))}. They are not of one adapter: copy or save both again."
            )


def _tokens(saved: dict[str, Tensor], config: dict[str, Any]) -> dict[str, list[int]]:
    """Name of each embedding of which the file has rows -> their indices."""
    entry: Any = config.get("trainable_token_indices")
    if not isinstance(entry, dict):
        entry = {"": entry}  # for any embedding
    tokens = {}
    for key, rows in saved.items():
        if not key.endswith(f".{DELTA}"):
            continue
        name = key.removesuffix(f".{DELTA}")
        matches = [indices for ending, indices in entry.items() if name.endswith(ending)]
        if len(matches) != 1 or matches[0] is None or rows.ndim != 2 or len(rows) != len(matches[0]):
            raise ValueError(
                f"key '{PREFIX}{key}' has shape {list(rows.shape)}: it must have one row for each index in "
                f"trainable_token_indices, {shown(config.get('trainable_token_indices'))} in {CONFIG_FILE}. Save the "
                "adapter again."
            )
        tokens[name] = matches[0]
    if any(entry.values()) and not tokens:  # PEFT writes those of tied weights once
        raise ValueError(
            f"has no rows for trainable_token_indices, {shown(config['trainable_token_indices'])} in {CONFIG_FILE}. "
            "Save the adapter again."
        )
    return tokens
