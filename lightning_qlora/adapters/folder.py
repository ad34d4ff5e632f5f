"""An adapter in PEFT's words: `adapter_config.json` and `adapter_model.safetensors`, read, checked and written.

Source of the format: peft/utils/save_and_load.py and peft/tuners/lora/config.py (0.17 to 0.21).
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from lightning_qlora.adapters.config_file import read_config
from lightning_qlora.files import open_safetensors
from lightning_qlora.quantize.packed import PackedWeight
from lightning_qlora.starts.since_start import Origin, fingerprint_of_weight
from lightning_qlora.writing import replaced_files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT puts before every name
METADATA = "lightning_qlora"  # our entry in the safetensors metadata, which PEFT leaves alone
FINGERPRINTS = "lightning_qlora_base"  # and a second, of the weights that a start moved
MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True)
class LayerAdapter:
    """The adapter of one layer: lora_A [r, in], lora_B [out, r], its alpha, and DoRA's magnitudes [out]."""

    lora_A: Tensor
    lora_B: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        """Rank."""
        return self.lora_A.shape[0]


@dataclass(frozen=True)
class Adapter:
    """All of an adapter, with names as the base model has them.

    Attributes:
        layers: Layer name -> its adapter.
        saved: Parameter or buffer name -> value, of the modules that were trained in full.
        modules_to_save: Names of those modules.
        targets: PEFT's target_modules.
        use_rslora: Scaled by alpha / sqrt(r).
        fan_in_fan_out: The layers are transformers' Conv1D, which keep their weight as [in, out].
        lora_dropout: Dropout in training.
        task_type: PEFT's word for what the model is for, or None.
        base_model: Folder or hub name of the base model, or None.
        quantization: How the base was quantized in training and what the adapters started from, where known; see
            `since_start.quantization_of`.
        bases: Layer name -> its 4-bit weight, where the adapters came with it.
        base_fingerprints: Layer name -> fingerprint of the 4-bit weight, where the start moved it.
        origin: What the adapters' start can be made again from, where known.
        source: File the tensors came from, for messages.
    """

    layers: dict[str, LayerAdapter]
    saved: dict[str, Tensor] = field(default_factory=dict)
    modules_to_save: list[str] = field(default_factory=list)
    targets: str | list[str] = field(default_factory=list)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    lora_dropout: float = 0.0
    task_type: str | None = None
    base_model: str | None = None
    quantization: dict[str, Any] | None = None
    bases: dict[str, PackedWeight] = field(default_factory=dict)
    base_fingerprints: dict[str, int] = field(default_factory=dict)
    origin: Origin | None = None
    source: str = WEIGHTS

    @property
    def use_dora(self) -> bool:
        """Whether the layers have DoRA's magnitudes."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    @property
    def r(self) -> int:
        """The rank of most layers."""
        return Counter(layer.r for layer in self.layers.values()).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """The alpha of most layers."""
        return Counter(_number(layer.alpha) for layer in self.layers.values()).most_common(1)[0][0]

    @property
    def rank_pattern(self) -> dict[str, int]:
        """The layers of another rank."""
        usual = self.r
        return {name: layer.r for name, layer in self.layers.items() if layer.r != usual}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """The layers of another alpha."""
        usual = self.alpha
        return {name: _number(layer.alpha) for name, layer in self.layers.items() if _number(layer.alpha) != usual}

    def is_transposed(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a layer's dense weight of this shape is [in, out], as Conv1D keeps it."""
        inputs, outputs = self.layers[name].lora_A.shape[1], self.layers[name].lora_B.shape[0]
        return tuple(shape) == (inputs, outputs) and (inputs != outputs or self.fan_in_fan_out)

    def scaling(self, name: str) -> float:
        """The factor of one layer's product."""
        layer = self.layers[name]
        return layer.alpha / (math.sqrt(layer.r) if self.use_rslora else layer.r)


def write_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """Write PEFT's two files; each replaces an older one of its name in one step."""
    # PEFT reads the keys of a pattern as regular expressions; a dot that stands for itself does no harm.
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.lora_dropout,
        "target_modules": adapter.targets,
        "modules_to_save": adapter.modules_to_save or None,
        "rank_pattern": adapter.rank_pattern,
        "alpha_pattern": adapter.alpha_pattern,
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "init_lora_weights": True,
        "bias": "none",
    }
    tensors = {PREFIX + name: value for name, value in adapter.saved.items()}
    for name, layer in adapter.layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = layer.magnitude
    metadata = {"format": "pt"}
    if adapter.quantization is not None:
        metadata[METADATA] = json.dumps(adapter.quantization)
    if adapter.bases:
        fingerprints = {name: fingerprint_of_weight(weight) for name, weight in adapter.bases.items()}
        metadata[FINGERPRINTS] = json.dumps(fingerprints)
    # clone: safetensors refuses tensors that share memory, as two names of a tied weight do.
    whole = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    with replaced_files(Path(folder)) as partial:
        save_file(whole, partial / WEIGHTS, metadata=metadata)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read what PEFT, or `write_adapter`, wrote.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is broken, or the adapter is of a kind that QLoRALinear does not compute.
    """
    config_path, path = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    config = read_config(config_path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Save the adapter with safetensors (PEFT's default).")
    with open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
        metadata = file.metadata() or {}
    # PEFT writes the base's weight beside the adapter of an output embedding. It never trains it, and a resized one
    # does not fit by its shape: the base brings its own.
    adapted = {key.partition(".lora_A")[0] for key in tensors if ".lora_A" in key}
    matrices: dict[str, dict[str, Tensor]] = {}
    saved = {}
    for key, tensor in tensors.items():
        owner, base_layer, _ = key.partition(".base_layer.")
        if base_layer and owner in adapted:
            continue
        if not key.startswith(PREFIX):
            raise ValueError(f"{path}: key {key!r} does not begin with {PREFIX!r}, so PEFT would not read it either.")
        name, part = _split(key, path)
        if part is None:
            saved[name] = tensor
        else:
            matrices.setdefault(name, {})[part] = tensor
    layers = {name: _layer(name, parts, config, path) for name, parts in matrices.items()}
    if not layers:
        raise ValueError(f"{path}: holds no lora_A and lora_B.")
    return Adapter(
        layers=layers,
        saved=saved,
        modules_to_save=list(config.get("modules_to_save") or []),
        targets=config.get("target_modules") or sorted(layers),
        use_rslora=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        lora_dropout=float(config.get("lora_dropout") or 0.0),
        task_type=config.get("task_type"),
        base_model=config.get("base_model_name_or_path"),
        quantization=_quantization(metadata, path),
        base_fingerprints=json.loads(metadata.get(FINGERPRINTS, "{}")),
        source=str(path),
    )


def vllm_objections(adapter: Adapter, max_lora_rank: int = 512) -> list[str]:
    """Why vLLM would not take an adapter, or would compute something else with it; empty if it would take it.

    Source: vllm/lora/peft_helper.py (validate_legal) and vllm/config/lora.py (ranks up to 512, `max_lora_rank`).
    """
    reasons = []
    if adapter.saved:
        modules = ", ".join(sorted({key.rpartition(".")[0] for key in adapter.saved})[:3])
        reasons.append(f"it trains modules in full ({modules}): vLLM supports no modules_to_save. Merge it instead.")
    if adapter.use_dora:
        reasons.append("use_dora: vLLM does not support DoRA. Merge it instead.")
    if adapter.rank_pattern or adapter.alpha_pattern:
        name = next(iter(adapter.rank_pattern or adapter.alpha_pattern))
        reasons.append(f"{name} has a rank or alpha of its own: vLLM takes one scaling for all layers. Merge it.")
    rank = max(layer.r for layer in adapter.layers.values())
    if rank > max_lora_rank:
        reasons.append(f"rank {rank} is above vLLM's limit of {max_lora_rank}.")
    return reasons


def _quantization(metadata: dict[str, str], path: Path) -> dict[str, Any] | None:
    """What `write_adapter` said of the base, where it was that which wrote."""
    if METADATA not in metadata:
        return None
    try:
        found = json.loads(metadata[METADATA])
    except ValueError as error:
        raise ValueError(f"{path}: its metadata {METADATA!r} is not valid JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: its metadata {METADATA!r} is {found!r}, not an object.")
    return found


def _split(key: str, path: Path) -> tuple[str, str | None]:
    """Layer and part ("lora_A", "lora_B", magnitude) of a key, or parameter name and None."""
    name = key.removeprefix(PREFIX)
    match = re.fullmatch(rf"(.+)\.(lora_A|lora_B|{MAGNITUDE})(\.default)?(\.weight)?", name)
    if match:
        return match[1], match[2]
    if ".lora_" in name or ".base_layer." in name:
        raise ValueError(f"{path}: key {key!r}: only lora_A, lora_B and {MAGNITUDE} of linear layers can be read.")
    return name, None


def _layer(name: str, parts: dict[str, Tensor], config: dict[str, Any], path: Path) -> LayerAdapter:
    for part in ("lora_A", "lora_B"):
        if part not in parts:
            raise ValueError(f"{path}: key '{PREFIX}{name}.{part}.weight' is missing.")
        if parts[part].ndim != 2:
            raise ValueError(
                f"{path}: key '{PREFIX}{name}.{part}.weight' has shape {list(parts[part].shape)}: only adapters of "
                "linear layers can be read."
            )
    if parts["lora_A"].shape[0] != parts["lora_B"].shape[1]:
        raise ValueError(
            f"{path}: '{PREFIX}{name}' has lora_A {list(parts['lora_A'].shape)} and lora_B "
            f"{list(parts['lora_B'].shape)}, whose ranks differ."
        )
    # As peft.utils.other.get_pattern_key: the first key that fits the end of the name.
    pattern = config.get("alpha_pattern") or {}
    own = next((alpha for key, alpha in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)
    alpha = config["lora_alpha"] if own is None else own
    return LayerAdapter(parts["lora_A"], parts["lora_B"], float(alpha), parts.get(MAGNITUDE))


def _number(value: float) -> float | int:
    rounded = round(value, 9)  # alpha is computed back from the scaling
    return int(rounded) if rounded == int(rounded) else rounded
