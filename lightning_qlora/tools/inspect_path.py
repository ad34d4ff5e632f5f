"""The content of a checkpoint, an adapter folder or a model folder, as lines for a person to read."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.adapters.base_compatibility import trained_on
from lightning_qlora.adapters.peft_config import BASE_MODEL, CONFIG_FILE
from lightning_qlora.adapters.peft_folder import WEIGHTS_FILE, read_adapter
from lightning_qlora.checkpoints.from_checkpoint import read_adapter_from_checkpoint
from lightning_qlora.files.hub import resolve_model
from lightning_qlora.files.lightning_checkpoint import is_shards
from lightning_qlora.files.safetensors_folder import WeightFolder, read_config
from lightning_qlora.huggingface.base_folder import stored_format
from lightning_qlora.layers.names import last_part, owner_name
from lightning_qlora.tensors.fingerprint import checksum
from lightning_qlora.texts import size_text


def inspect_path(path: str, weights_only: bool = True) -> list[tuple[str, str]]:
    """Describe a Lightning checkpoint, a PEFT adapter folder, or the folder or hub name of a model: names and values.

    Raises FileNotFoundError or ValueError if it does not exist or is broken.
    """
    if is_shards(path) or os.path.isfile(path):
        adapter = read_adapter_from_checkpoint(path, weights_only=weights_only)
        files = [path for path in Path(path).rglob("*") if path.is_file()] or [Path(path)]  # shards, or one file
        return [
            ("kind", "Lightning checkpoint of a converted module"),
            ("size of the checkpoint", size_text(sum(file.stat().st_size for file in files))),
            *_adapter_lines(adapter),
            ("base fingerprint", fingerprint_of_base(adapter) or "none: the checkpoint contains the base"),
        ]
    if any(os.path.isfile(os.path.join(path, name)) for name in (CONFIG_FILE, WEIGHTS_FILE)):
        return [("kind", "PEFT adapter"), *_adapter_lines(read_adapter(path))]
    return _model_lines(WeightFolder(resolve_model(path)))


def fingerprint_of_base(adapter: Adapter) -> str | None:
    """One number for all fingerprints in the checkpoint of an adapter, in hexadecimal; None if it had none."""
    numbers = [number for name, number in sorted(adapter.fingerprints.items()) if name not in adapter.bases]
    if not numbers:
        return None
    return checksum(torch.tensor(numbers, device="cpu"))


def _adapter_lines(adapter: Adapter) -> list[tuple[str, str]]:
    names = _names_of_layers(adapter)
    endings = Counter(last_part(name.removesuffix(".weight")) for name in names)
    tensors = [*adapter.saved.values(), *(t for state in adapter.layers.values() for t in state.values())]
    kinds = {"rsLoRA": adapter.config["use_rslora"], "DoRA": adapter.config["use_dora"]}
    quantization = "unknown"
    if adapter.quantization is not None:
        quantization = ", ".join(f"{name}={value}" for name, value in adapter.quantization.entry().items())
    return [
        ("base", adapter.config[BASE_MODEL] or "unknown"),
        ("quantization", quantization),
        ("trained on", trained_on(adapter.quantization)),
        ("layers", f"{len(names)}: " + ", ".join(f"{name} x{count}" for name, count in endings.items())),
        ("rank", _counts(map(adapter.rank, names))),
        ("alpha", _counts(map(adapter.alpha, names))),
        ("kind of LoRA", ", ".join(kind for kind, is_used in kinds.items() if is_used) or "plain"),
        ("modules_to_save", ", ".join(sorted({owner_name(key) for key in adapter.saved})) or "nothing"),
        ("weights", f"{sum(t.numel() for t in tensors):,}"),
        ("size of the weights", size_text(sum(t.nbytes for t in tensors))),
    ]


def _names_of_layers(adapter: Adapter) -> list[str]:
    """The names of parameters with experts where the config has them in full, else PEFT's names of their wrappers."""
    parameters = sorted(adapter.target_parameters)
    counts = Counter(map(owner_name, parameters))
    in_full = {owner for owner, keys in adapter.modules.items() if len(keys) == counts[owner]}
    others = [key for owner, keys in adapter.modules.items() for key in keys if owner not in in_full]
    return others + [name for name in parameters if owner_name(name) in in_full]


def _counts(values: Iterable[float]) -> str:
    counter = Counter(values)
    if len(counter) == 1:
        return f"{next(iter(counter)):g}"
    return ", ".join(f"{value:g} (x{count})" for value, count in counter.most_common())


def _model_lines(folder: WeightFolder) -> list[tuple[str, str]]:
    config = read_config(folder.folder)
    packed = {key for key in folder.entries if folder.is_packed(key)}
    sizes = Counter[str]()
    for key, entry in folder.entries.items():
        weight = f"{key}.".partition(".weight.")[0] + ".weight"  # also of the scales of a 4-bit weight
        sizes["4-bit" if weight in packed else entry.dtype] += entry.nbytes
    architectures = config.get("architectures")
    if not isinstance(architectures, list):
        architectures = []
    names = [file.name for file in folder.files()]
    return [
        ("kind", "model folder, 4-bit (bitsandbytes)" if packed else "model folder"),
        ("architecture", ", ".join(map(str, architectures)) or "unknown"),
        ("quantization", _quantization(folder, config, packed)),
        ("4-bit layers", str(len(packed))),
        ("tensors", str(len(folder.entries))),
        ("files", f"{len(names)}: " + " to ".join(dict.fromkeys([names[0], names[-1]]))),
        ("size", ", ".join(f"{dtype} {size_text(count)}" for dtype, count in sizes.most_common())),
    ]


def _quantization(folder: WeightFolder, config: dict[str, Any], packed: set[str]) -> str:
    stored = stored_format(config)
    if stored and not stored.get("load_in_4bit"):
        words = [stored.get(key) for key in ("quant_method", "format", "weight_block_size")]
        return ", ".join(str(word) for word in words if word)
    if not packed:
        return "none"
    first = min(packed)
    key = next(key for key in folder.entries if key.startswith(first + ".quant_state."))
    text = f"bitsandbytes, {key.rpartition('__')[2]}"
    if f"{first}.nested_absmax" in folder.entries:
        text += ", double quantization"
    return text
