"""The content of a checkpoint, an adapter folder or a model folder, as lines for a person to read."""

import os
from collections import Counter
from pathlib import Path

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.adapters.base_compatibility import trained_on
from lightning_qlora.adapters.from_checkpoint import (
    fingerprint_of_base,
    read_adapter_from_checkpoint,
    read_converted_state_dict,
)
from lightning_qlora.adapters.peft_files import CONFIG_FILE
from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.adapters.published_formats import published_format
from lightning_qlora.files.hub import resolve_model
from lightning_qlora.files.lightning_checkpoint import is_shards
from lightning_qlora.files.safetensors_folder import WeightFolder, read_config
from lightning_qlora.layers.dotted_names import last_part, owner_name
from lightning_qlora.training.report import size_text


def inspect_path(path: str, weights_only: bool = True) -> list[tuple[str, str]]:
    """Describe a Lightning checkpoint, a PEFT adapter folder, or the folder or hub name of a model: names and values.

    Raises FileNotFoundError or ValueError if it does not exist or is broken.
    """
    if is_shards(path) or os.path.isfile(path):
        state, _ = read_converted_state_dict(path, weights_only)
        adapter = read_adapter_from_checkpoint(path, weights_only=weights_only)
        files = [path for path in Path(path).rglob("*") if path.is_file()] or [Path(path)]  # one, or shards
        return [
            ("kind", "Lightning checkpoint of a converted module"),
            ("size of the checkpoint", size_text(sum(file.stat().st_size for file in files))),
            *_adapter_lines(adapter),
            ("base fingerprint", fingerprint_of_base(state) or "none: the checkpoint contains the base"),
        ]
    if os.path.isfile(os.path.join(path, CONFIG_FILE)):
        return [("kind", "PEFT adapter"), *_adapter_lines(read_adapter(path))]
    return _model_lines(WeightFolder(resolve_model(path)))


def _adapter_lines(adapter: Adapter) -> list[tuple[str, str]]:
    layers = adapter.layers | adapter.expert_adapters
    of_experts = {adapter.peft_config.get("r", 0): len(adapter.expert_adapters)}  # their matrices hold many experts
    ranks = Counter(layer.r for layer in adapter.layers.values()) + Counter(of_experts)
    alphas = Counter(layer.alpha for layer in layers.values())
    endings = Counter(last_part(name) for name in layers)
    matrices = [t for layer in layers.values() for t in (layer.lora_A, layer.lora_B, layer.magnitude)]
    tensors = [t for t in [*matrices, *adapter.saved.values()] if t is not None]
    kinds = [kind for kind, used in (("rsLoRA", adapter.use_rslora), ("DoRA", adapter.use_dora)) if used]
    how = adapter.quantization
    return [
        ("base", adapter.base_model or "unknown"),
        ("quantization", "unknown" if how is None else ", ".join(f"{name}={value}" for name, value in how.items())),
        ("trained on", trained_on(adapter.quantization)),
        ("layers", f"{len(layers)}: " + ", ".join(f"{name} x{count}" for name, count in endings.items())),
        ("rank", _counts(ranks)),
        ("alpha", _counts(alphas)),
        ("kind of LoRA", ", ".join(kinds) or "plain"),
        ("modules_to_save", ", ".join(sorted({owner_name(key) for key in adapter.saved})) or "nothing"),
        ("weights", f"{sum(t.numel() for t in tensors):,}"),
        ("size of the weights", size_text(sum(t.nbytes for t in tensors))),
    ]


def _counts(counter: Counter[int] | Counter[float]) -> str:
    if len(counter) == 1:
        return f"{next(iter(counter)):g}"
    return ", ".join(f"{value:g} (x{count})" for value, count in counter.most_common())


def _model_lines(folder: WeightFolder) -> list[tuple[str, str]]:
    config = read_config(folder.folder)
    packed = {key for key in folder.entries if folder.is_packed(key)}
    types = Counter[str]()
    for key, entry in folder.entries.items():
        weight = key.partition(".weight.")[0] + ".weight" if ".weight." in key else key  # or its scales
        types["4-bit" if weight in packed else entry.dtype] += entry.nbytes
    named, files = config.get("architectures"), folder.files()
    published = published_format(config)
    stored = published or config.get("quantization_config")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    quantization = f"{method}, {_quant_type(folder, packed)}" if method and packed else "none"
    if published is not None:
        details = (published.get("format"), published.get("weight_block_size"))
        quantization = ", ".join(str(word) for word in (method, *details) if word)
    return [
        ("kind", "model folder, 4-bit (bitsandbytes)" if packed else "model folder"),
        ("architecture", ", ".join(map(str, named)) if named and isinstance(named, list) else "unknown"),
        ("quantization", quantization),
        ("4-bit layers", str(len(packed))),
        ("tensors", str(len(folder.entries))),
        ("files", f"{len(files)}: {files[0].name}" + (f" to {files[-1].name}" if len(files) > 1 else "")),
        ("size", ", ".join(f"{kind} {size_text(count)}" for kind, count in types.most_common())),
    ]


def _quant_type(folder: WeightFolder, packed: set[str]) -> str:
    first = min(packed)
    key = next(key for key in folder.entries if key.startswith(first + ".quant_state."))
    nested = f"{first}.nested_absmax" in folder.entries
    return key.rpartition("__")[2] + (", double quantization" if nested else "")
