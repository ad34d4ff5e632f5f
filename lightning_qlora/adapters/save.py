"""save_adapter: the adapters of a module as a PEFT folder, and what such a folder does not hold."""

import os
import warnings
from collections.abc import Collection, Iterator
from typing import get_args

from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn

from lightning_qlora.adapters.adapter import Adapter, State
from lightning_qlora.adapters.base_compatibility import Quantization, required_base
from lightning_qlora.adapters.peft_experts import taken_for_experts
from lightning_qlora.adapters.peft_folder import write_adapter
from lightning_qlora.adapters.peft_layers import describe_base, to_peft, trained_modules
from lightning_qlora.checks import TRAIN_IN_FULL, check_choice, check_converted, first_of
from lightning_qlora.config import Base
from lightning_qlora.layers.lora_layer import ADAPTER, INITIAL, LoRALayer
from lightning_qlora.layers.names import join, owner_name
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.records import conversion_of, float_buffers
from lightning_qlora.tensors.dtensor import gather, reshard
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
    for text in _warnings(parts, adapter):
        warnings.warn(text, stacklevel=2)
    rank_zero_only(write_adapter)(adapter, folder)


def _warnings(parts: Parts, adapter: Adapter) -> Iterator[str]:
    """What the folder of an adapter does not hold, and which base and which code it needs."""
    requirement = required_base(adapter.quantization)
    if requirement:
        yield requirement
    base = parts.base
    prefix = parts.base_name
    kind = type(base.root).__name__
    outside = []
    if prefix:
        inside = set(base.modules)
        outside = [name for name, part in trained_modules(parts, parts).items() if part not in inside]
    if outside:
        names = ", ".join(name or type(parts.root).__name__ for name in outside)
        yield (
            f"The folder gets the adapters of {prefix!r}, a {kind}, and not what trains outside of it: {names}. A "
            "Lightning checkpoint has all of it."
        )
    dense = taken_for_experts(base, dora=True) if adapter.config["use_dora"] else []
    if dense:
        yield (
            f"PEFT can't load the adapters of {len(dense)} layers ({first_of(dense, 1)}): it takes their names for "
            "those of the experts, and has no DoRA for these. Merge the adapter, or load the folder with "
            "lightning_qlora (adapter=FOLDER)."
        )
    changed = _changed_buffers(parts, {join(prefix, owner_name(key)) for key in adapter.saved})
    if changed:
        yield (
            f"The folder does not get the buffers that training changed: {first_of(changed, 3)}. A Lightning "
            f"checkpoint has them; or {TRAIN_IN_FULL}."
        )
    layers = [name for name, layer in base.layers.items() if layer.weight_was_read]
    if layers:
        yield (
            f"PEFT adds an adapter where its layer is called. Other code read the weights of {len(layers)} layers of "
            f"this {kind} ({first_of(layers, 3)}): where it computes with them instead, as nn.MultiheadAttention does, "
            "merge the adapter, or load the folder with lightning_qlora (adapter=FOLDER)."
        )


def get_adapter(parts: Parts, base: Base = "quantized") -> Adapter:
    """The adapters of a module as a PEFT folder for this base; names are those in the base model.

    ValueError if PEFT's format has no place for what trained.
    """
    base_model = parts.base
    layers = base_model.layers
    check_converted(parts.root, layers)
    parts.check_adapters_finite()
    trained = trained_modules(base_model, parts)
    if "" in trained:
        raise ValueError(
            f"A parameter of the {type(base_model.root).__name__} itself trains, and PEFT's modules_to_save can only "
            "name modules inside it. Freeze it, or use a Lightning checkpoint instead of a PEFT folder."
        )
    if trained:
        _check_endings(list(trained), base_model)
    saved: State = {}
    for name, part in trained.items():
        saved |= {f"{name}.{key}": value for key, value in _state_of(part).items()}
    first = next(iter(layers.values()))
    return to_peft(
        describe_base(parts, first.config, trained),
        {name: layer.config for name, layer in layers.items()},
        {name: _state_of_layer(layer) for name, layer in layers.items()},
        Quantization.of(first),
        base,
        saved=saved,
        source=type(parts.root).__name__,
    )


def _state_of_layer(layer: LoRALayer) -> State:
    values = {name: getattr(layer, name) for name in ADAPTER}
    values |= zip(INITIAL, layer.initial or (), strict=False)
    return {name: gather(value).detach() for name, value in values.items() if value is not None}


def _state_of(part: nn.Module) -> State:
    """The tensors that PEFT saves of a module: its direct parameters and persistent buffers."""
    return {
        key: gather(value).detach()
        for key, value in {**part._parameters, **part._buffers}.items()
        if value is not None and key not in part._non_persistent_buffers_set
    }


def _check_endings(names: list[str], base: Parts) -> None:
    """Refuse names that are the ending of another module's name: PEFT's modules_to_save would select both."""
    for name in names:
        others = [other for other, _ in base.named if other.endswith(name) and other not in names]
        if others:
            raise ValueError(
                f"{name!r} was trained in full, and PEFT would also select {others[0]!r}, whose name ends the same: "
                "its modules_to_save has no form for one alone. Use a Lightning checkpoint, or merge the adapters."
            )


def _changed_buffers(parts: Parts, saved: Collection[str]) -> list[str]:
    conversion = conversion_of(parts.root)
    if conversion is None or not conversion.buffers:
        return []
    before = conversion.buffers
    return [
        name
        for name, value in float_buffers(parts.named)
        if name in before and owner_name(name) not in saved and fingerprint(value) != before[name]
    ]
