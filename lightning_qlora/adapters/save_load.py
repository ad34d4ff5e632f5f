"""Save the adapters of a module as a PEFT folder, and load such a folder into a module."""

import os
import warnings
from collections.abc import Collection, Mapping
from typing import get_args

from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn

from lightning_qlora.adapters.module_adapter import get_adapter, inference_mode_of, set_adapter
from lightning_qlora.checkpoints.base_model import trained_modules
from lightning_qlora.checkpoints.conversion import conversion_of, float_buffers
from lightning_qlora.checkpoints.recorded_origins import convert_as_recorded
from lightning_qlora.checks import TRAIN_IN_FULL, check_choice, first_of
from lightning_qlora.config import Base
from lightning_qlora.layers.derived import original_class
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import join, owner_name, without_wrappers
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.peft.base_compatibility import required_base
from lightning_qlora.peft.peft_folder import read_adapter, write_adapter
from lightning_qlora.peft.peft_layers import taken_for_experts
from lightning_qlora.survey.parts import Parts
from lightning_qlora.tensors.dtensor import reshard
from lightning_qlora.tensors.fingerprint import fingerprint


def save_adapter(
    module: nn.Module,
    folder: str | os.PathLike[str],
    base: Base = "quantized",
) -> None:
    """Write a module's adapters as `peft.PeftModel.from_pretrained(base_model, folder)` reads them.

    Names are those of the transformers model inside the module, so the folder works without Lightning. With sharded
    parameters call it on all ranks; rank 0 writes. Adapters of experts are written as PEFT's `target_parameters`, with
    lora_dropout=0, which PEFT requires.

    Args:
        module: A converted module, LightningModule or not.
        folder: Where to write; files of the same names are replaced, each in one step.
        base: The base model that the adapter will be used with: in 4 bits ("quantized"), as in training, or in 16 or 32
            bits ("float"). They differ only for adapters that were initialized from the weight or its quantization
            error: for "float" the initial values are subtracted, which doubles the rank.

    Raises:
        ValueError: If there is no adapter, it holds NaN or Inf, or PEFT's format has no place for what was trained.
        RuntimeError: If a layer with an adapter was replaced by a dense one, as resize_token_embeddings does.

    Example:
        ```python
        from lightning_qlora import convert, save_adapter
        from torch import nn

        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        convert(model, r=4)
        save_adapter(model, "adapter")  # adapter_config.json and adapter_model.safetensors
        ```
    """
    check_choice("base", base, get_args(Base))
    parts = Parts.of(module)
    reshard(parts.modules)
    adapter = get_adapter(parts, base)
    requirement = required_base(adapter.quantization)
    if requirement:
        warnings.warn(requirement, stacklevel=2)
    prefix = parts.base_name
    kind = type(parts.base.root).__name__
    inside = set(parts.base.modules)
    outside = [name for name, part in trained_modules(parts, parts.unchanged).items() if part not in inside]
    if outside:
        warnings.warn(
            f"The folder gets the adapters of {prefix!r}, a {kind}, and not what trains outside of it: "
            f"{', '.join(name or type(module).__name__ for name in outside)}. A Lightning checkpoint has all of it.",
            stacklevel=2,
        )
    dense = taken_for_experts(parts.base, dora=True) if adapter.config["use_dora"] else []
    if dense:
        warnings.warn(
            f"PEFT can't load the adapters of {len(dense)} layers ({first_of(dense, 1)}): it takes their names for "
            "those of the experts, and has no DoRA for these. Merge the adapter, or load the folder with "
            "lightning_qlora (adapter=FOLDER).",
            stacklevel=2,
        )
    changed = _changed_buffers(parts, {join(prefix, owner_name(key)) for key in adapter.saved})
    if changed:
        warnings.warn(
            f"The folder does not get the buffers that training changed: {first_of(changed, 3)}. A Lightning "
            f"checkpoint has them; or {TRAIN_IN_FULL}.",
            stacklevel=2,
        )
    layers = layers_that_are_only_read(parts.base.layers)
    if layers:
        warnings.warn(
            f"PEFT would load the adapters of {len(layers)} layers of this {kind} "
            f"({first_of(layers, 3)}), but not use them in this way: other code than nn.Linear's reads the weights of "
            "these layers. Merge the adapter, or load the folder with lightning_qlora (adapter=FOLDER).",
            stacklevel=2,
        )
    rank_zero_only(write_adapter)(adapter, folder)


def layers_that_are_only_read(layers: Mapping[str, LoRALayer]) -> list[str]:
    """Names of converted layers whose weight other code multiplied with, or read without calling the layer.

    PEFT adds s B A x to the output of a layer. The forward pass of a subclass may compute that with its weight, too.
    """
    names = []
    for name, layer in layers.items():
        if not isinstance(layer, QLoRALinear):
            continue
        has_own_forward = original_class(type(layer)).forward is not nn.Linear.forward
        if layer.was_read_alone or (layer.weight_was_called and not has_own_forward):
            names.append(name)
    return names


def _changed_buffers(parts: Parts, saved: Collection[str]) -> list[str]:
    conversion = conversion_of(parts.root)
    if conversion is None or not conversion.buffers:
        return []
    before = conversion.buffers
    return [
        name
        for name, value in float_buffers(parts)
        if name in before and owner_name(name) not in saved and fingerprint(value) != before[name]
    ]


def load_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load an adapter folder of PEFT or `save_adapter` into a converted module.

    Ranks and scalings become those of the folder; layers that are not in the folder get the default initialization,
    B = 0. What trains in full and is not in it keeps its values, with a warning. To convert exactly the layers of the
    folder, pass `adapter=folder` to `QLoRAPrecision` or `convert` instead.

    Args:
        module: A converted module, LightningModule or not.
        folder: The folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        FileNotFoundError, ValueError: If a file is missing or broken.
        CheckpointMismatchError: If the adapter does not fit the module; names the file and the key.

    Example:
        ```python
        from lightning_qlora import convert, load_adapter, save_adapter
        from torch import nn

        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        convert(model, r=4)
        save_adapter(model, "adapter")
        load_adapter(model, "adapter")
        ```
    """
    parts = Parts.of(module)
    reshard(parts.modules)
    with inference_mode_of(parts):
        adapter = read_adapter(folder)
        conversion = conversion_of(parts.root)
        if conversion is not None:
            layers = [join(without_wrappers(parts.base_name), name) for name in adapter.modules]
            origins = {join(name, "weight"): "" for name in layers}
            parts = convert_as_recorded(parts, origins, conversion)
        set_adapter(parts, adapter)
    trained = trained_modules(parts.base, parts.base.unchanged)
    loaded = {trained.get(owner_name(key)) for key in adapter.saved}
    kept = [name for name, part in trained.items() if part not in loaded]
    if kept:
        warnings.warn(
            f"{folder} has no values for what trains in full, or has changed: {first_of(kept, 3)}. They stay as they "
            "are, which may be those of an earlier adapter. For the pretrained ones build the module again.",
            stacklevel=2,
        )
