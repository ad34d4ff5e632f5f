"""What is in a checkpoint, an adapter folder or a model folder, in lines for a person to read."""

import os
from collections import Counter
from pathlib import Path

from lightning_qlora.adapters.folder import CONFIG, Adapter, read_adapter, vllm_objections
from lightning_qlora.checkpoint_adapter import adapter_of_checkpoint, fingerprint_of_base, read_state
from lightning_qlora.checkpoint_file import is_shards
from lightning_qlora.files import WeightFolder, read_json, resolve_model
from lightning_qlora.report import size_text
from lightning_qlora.starts.since_start import belongs_to


def inspect_path(path: str, weights_only: bool = True) -> list[tuple[str, str]]:
    """Names and values of what is there.

    Args:
        path: A Lightning checkpoint, PEFT's adapter folder, or a model's folder or hub name.
        weights_only: As in `torch.load`, for a checkpoint.

    Raises:
        FileNotFoundError, ValueError: If there is nothing, or it is broken.
    """
    if os.path.isfile(path) or is_shards(path):
        state, _ = read_state(path, weights_only)
        adapter = adapter_of_checkpoint(path, weights_only=weights_only)
        lines = [("kind", "Lightning checkpoint of a converted module"), *_of_adapter(adapter)]
        return [*lines, ("base fingerprint", fingerprint_of_base(state) or "none: the base is in the checkpoint")]
    if os.path.isfile(os.path.join(path, CONFIG)):
        return [("kind", "PEFT adapter"), *_of_adapter(read_adapter(path))]
    return _of_model(WeightFolder(resolve_model(path)))


def _of_adapter(adapter: Adapter) -> list[tuple[str, str]]:
    ranks = Counter(layer.r for layer in adapter.layers.values())
    alphas = Counter(layer.alpha for layer in adapter.layers.values())
    endings = Counter(name.rpartition(".")[2] for name in adapter.layers)
    tensors = [t for layer in adapter.layers.values() for t in (layer.lora_A, layer.lora_B, layer.magnitude)]
    adapters = [t for t in tensors if t is not None]
    saved = list(adapter.saved.values())
    kinds = [word for word, on in (("rsLoRA", adapter.use_rslora), ("DoRA", adapter.use_dora)) if on]
    objections = vllm_objections(adapter)
    return [
        ("base", adapter.base_model or "not said"),
        ("quantization", _quantization(adapter)),
        ("is for", belongs_to(adapter.quantization) or "the base in 4 bits, and in 16 or 32"),
        ("layers", f"{len(adapter.layers)}: " + ", ".join(f"{name} x{count}" for name, count in endings.items())),
        ("rank", _counts(ranks)),
        ("alpha", _counts(alphas)),
        ("kind of LoRA", ", ".join(kinds) or "plain"),
        ("trained in full", ", ".join(sorted({key.rpartition(".")[0] for key in adapter.saved})) or "nothing"),
        ("weights", f"{sum(t.numel() for t in [*adapters, *saved]):,}"),
        ("size", size_text(sum(t.nbytes for t in [*adapters, *saved]))),
        ("vLLM", " ".join(objections) or f"takes it (--max-lora-rank {max(ranks)} or more)"),
    ]


def _quantization(adapter: Adapter) -> str:
    found = adapter.quantization
    return "not said" if found is None else ", ".join(f"{name}={value}" for name, value in found.items())


def _counts(counter: Counter[int] | Counter[float]) -> str:
    if len(counter) == 1:
        return f"{next(iter(counter)):g}"
    return ", ".join(f"{value:g} (x{count})" for value, count in counter.most_common())


def _of_model(folder: WeightFolder) -> list[tuple[str, str]]:
    path = folder.folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    packed = {key for key in folder.entries if folder.is_packed(key)}
    types = Counter[str]()
    for key, entry in folder.entries.items():
        types["4-bit" if key.partition(".weight.")[0] + ".weight" in packed or key in packed else entry.dtype] += (
            entry.nbytes
        )
    stored = config.get("quantization_config") or {}
    return [
        ("kind", "model folder, 4-bit (bitsandbytes)" if packed else "model folder"),
        ("architecture", ", ".join(config.get("architectures") or ["not said"])),
        ("quantization", f"{stored['quant_method']}, {_type(folder, packed)}" if stored and packed else "none"),
        ("4-bit layers", str(len(packed))),
        ("tensors", str(len(folder.entries))),
        ("files", f"{len(folder.files())}: {_names(folder.files())}"),
        ("size", ", ".join(f"{kind} {size_text(count)}" for kind, count in types.most_common())),
    ]


def _type(folder: WeightFolder, packed: set[str]) -> str:
    first = min(packed)
    key = next(key for key in folder.entries if key.startswith(first + ".quant_state."))
    nested = f"{first}.nested_absmax" in folder.entries
    return key.rpartition("__")[2] + (", double quantization" if nested else "")


def _names(files: list[Path]) -> str:
    return files[0].name if len(files) == 1 else f"{files[0].name} to {files[-1].name}"
