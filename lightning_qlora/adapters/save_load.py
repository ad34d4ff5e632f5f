"""Save the adapters of a module as a PEFT folder, and load such a folder into a module."""

import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import get_args

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_qlora.adapters.adapter import MAGNITUDE, PREFIX, Adapter, LayerAdapter, check_tie, tied_names
from lightning_qlora.adapters.base_compatibility import (
    check_required_base,
    convert_to_float_base,
    record_initialization,
    required_base,
)
from lightning_qlora.adapters.base_model import (
    adapter_on_base,
    describe_base,
    find_base_model,
    target_modules_of,
    trained_in_full,
    trained_outside,
)
from lightning_qlora.adapters.conversion import conversion_of, float_buffers
from lightning_qlora.adapters.module_state import check_finite
from lightning_qlora.adapters.peft_experts import assign_parameters, check_sizes, refuse
from lightning_qlora.adapters.peft_folder import exact, read_adapter, write_adapter
from lightning_qlora.checks import check_choice, first_of, shown
from lightning_qlora.config import Base, QLoRAConfig
from lightning_qlora.layers.dtensor import gather, is_sharded, reshard, shard_like
from lightning_qlora.layers.fingerprint import fingerprint
from lightning_qlora.layers.input_statistics import stop_waiting
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import join, last_part, owner_name, without_wrappers
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers, base_layers
from lightning_qlora.layers.trainable_tokens import DELTA, token_indices

# Beside stacks of experts PEFT applies these targets to the stacks, and not to dense MLPs and shared experts with these
# names (peft/utils/transformers_weight_conversion.py), unless target_parameters name them.
TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


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
    """
    check_choice("base", base, get_args(Base))
    reshard(module)
    adapter = get_adapter(module)
    if base == "float":
        adapter = convert_to_float_base(adapter)
    else:
        requirement = required_base(adapter.quantization)
        if requirement:
            warnings.warn(requirement, stacklevel=2)
    prefix, inner = find_base_model(module)
    outside = trained_outside(module)
    if outside:
        warnings.warn(
            f"The folder gets the adapters of {prefix!r}, a {type(inner).__name__}, and not what trains outside of it: "
            f"{', '.join(name or type(module).__name__ for name in outside)}. A Lightning checkpoint has all of it.",
            stacklevel=2,
        )
    changed = _changed_buffers(module, {join(prefix, name) for name in adapter.modules_to_save})
    if changed:
        warnings.warn(
            f"The folder does not get the buffers that training changed: {first_of(changed, 3)}. A Lightning "
            "checkpoint has them; or name their modules in modules_to_save.",
            stacklevel=2,
        )
    layers = layers_that_are_only_read(inner)
    if layers:
        warnings.warn(
            f"PEFT would load the adapters of {len(layers)} layers of this {type(inner).__name__} "
            f"({first_of(layers, 3)}), but not use them: the model reads the weights of these layers and does not "
            "call them. Merge the adapter, or load the folder with lightning_qlora (adapter=FOLDER).",
            stacklevel=2,
        )
    adapter = _as_parameters(adapter, inner)
    rank_zero_only(write_adapter)(adapter, folder)


def _as_parameters(adapter: Adapter, base: nn.Module) -> Adapter:
    """The adapter with dense MLPs and shared experts beside stacks of experts as PEFT's `target_parameters`.

    With DoRA, which PEFT does not have for parameters, the adapter is returned unchanged, with a warning.
    """
    parameters = [*(name for name, _ in base.named_parameters()), *adapter.experts]
    others = (name for name in adapter.layers if name not in adapter.experts)
    names = [name for name in others if last_part(name) in TAKEN_FOR_EXPERTS]
    if not names or not any(name.endswith("experts.gate_up_proj") for name in parameters):
        return adapter
    if adapter.use_dora:
        warnings.warn(
            f"PEFT can't load the adapters of {len(names)} layers ({names[0]}, ...): it takes their names for those of "
            "the experts, and has no DoRA for these. Merge the adapter, or load the folder with lightning_qlora "
            "(adapter=FOLDER).",
            stacklevel=3,
        )
        return adapter
    layers = frozenset(names)
    return replace(adapter, as_parameters=layers, target_modules=target_modules_of(base, layers))


def layers_that_are_only_read(base: nn.Module) -> list[str]:
    """Names of converted layers whose weight other code multiplied with, or read without calling the layer."""
    names = []
    for name, layer in adapted_layers(base).items():
        if type(layer).forward is QLoRALinear.forward and layer.is_only_read:
            names.append(name)
    return names


def _changed_buffers(module: nn.Module, saved: Collection[str]) -> list[str]:
    """Names of the buffers that changed since conversion, outside of the modules that are saved."""
    conversion = conversion_of(module)
    if conversion is None:
        return []
    buffers = {name: value for name, value in float_buffers(module) if name in conversion.buffers}
    return [
        name
        for name, value in buffers.items()
        if owner_name(name) not in saved and fingerprint(value) != conversion.buffers[name]
    ]


def load_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load an adapter folder of PEFT or `save_adapter` into a converted module.

    Ranks and scalings become those of the folder; layers that are not in the folder get the default initialization,
    B = 0. To convert exactly the layers of the folder, pass `adapter=folder` to `QLoRAPrecision` or `convert` instead.

    Args:
        module: A converted module, LightningModule or not.
        folder: The folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        FileNotFoundError, ValueError: If a file is missing or broken.
        CheckpointMismatchError: If the adapter does not fit the module; names the file and the key.
    """
    reshard(module)
    set_adapter_of_module(module, read_adapter(folder))


def get_adapter(module: nn.Module) -> Adapter:
    """The adapters of a module; names are those in the base model."""
    _, base = find_base_model(module)
    layers = base_layers(base)
    _check_converted(module, layers)
    check_finite(module)
    trained = trained_in_full(module)
    if "" in trained:
        raise ValueError(
            f"A parameter of the {type(base).__name__} itself trains, and PEFT's modules_to_save can only name modules "
            "inside it. Freeze it, or use a Lightning checkpoint instead of a PEFT folder."
        )
    _check_endings(list(trained), base)
    saved: dict[str, Tensor] = {}
    for name, part in trained.items():
        saved |= {f"{name}.{key}": value for key, value in _state_of(part).items()}
    return adapter_on_base(
        describe_base(module, next(iter(layers.values())).config, trained),
        {name: layer.config for name, layer in layers.items()},
        {name: _adapter_of_layer(layer) for name, layer in layers.items()},
        saved=saved,
        base_fingerprints={name: layer.base_fingerprint() for name, layer in layers.items()},
        source=type(module).__name__,
    )


def _adapter_of_layer(layer: LoRALayer) -> LayerAdapter:
    """Its parameters, whole."""
    magnitude: Tensor | None = layer.lora_magnitude_vector
    if magnitude is not None:
        magnitude = gather(magnitude).detach()
    return LayerAdapter(
        lora_A=gather(layer.lora_A).detach(),
        lora_B=gather(layer.lora_B).detach(),
        alpha=layer.config.lora_alpha,
        magnitude=magnitude,
        initial=layer.initial,
    )


def _check_converted(module: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no adapter. Convert it first: Trainer.fit and fabric.setup do so with "
            "plugins=QLoRAPrecision(), or call lightning_qlora.convert(module)."
        )


def set_adapter_of_module(module: nn.Module, adapter: Adapter) -> None:
    """Set the adapters of a converted module, in place: the parameters stay the same objects.

    Raises CheckpointMismatchError as `load_adapter`.
    """
    _, base = find_base_model(module)
    layers = base_layers(base)
    _check_converted(module, layers)
    adapter = assign_parameters(adapter, base)
    _check_fits(base, layers, adapter)
    check_required_base(adapter, layers)
    for name, layer in layers.items():
        stop_waiting(layer)
        layer.set_initial(None)
        record_initialization(layer, adapter.quantization)
        saved = adapter.layers.get(name)
        if saved is None:
            layer.set_config(replace(layer.config, use_rslora=adapter.use_rslora))
            layer.reset_adapter()
            continue
        layer.set_config(replace(layer.config, use_rslora=adapter.use_rslora, r=saved.r, lora_alpha=saved.alpha))
        values = {"lora_A": saved.lora_A, "lora_B": saved.lora_B, MAGNITUDE: saved.magnitude}
        for key, value in values.items():
            if value is not None:
                layer.write(key, value.to(layer.lora_A.dtype).contiguous())
    tensors = _named_tensors(base)
    with torch.no_grad():
        for key, value in adapter.saved.items():
            tensors[key].copy_(shard_like(value, tensors[key]))
    for part in module.modules():
        conversion = conversion_of(part)
        if conversion is not None:  # checkpoints name what differs from these arguments layer by layer
            conversion.config = replace(
                conversion.config,
                r=adapter.r,
                lora_alpha=adapter.alpha,
                use_rslora=adapter.use_rslora,
                rank_pattern={},
                alpha_pattern={},
            )


def config_of_adapter(module: nn.Module, adapter: Adapter, config: QLoRAConfig) -> QLoRAConfig:
    """`config` with the layers, ranks and scalings of the adapter; CheckpointMismatchError if the module lacks one."""
    prefix, base = find_base_model(module)
    adapter = assign_parameters(adapter, base)
    inner = [*(name for name, _ in base.named_modules()), *adapter.experts]
    names = {without_wrappers(name): join(prefix, name) for name in inner}
    targets = list(adapter.layers)
    missing = [name for name in targets if name not in names]
    if missing:
        refuse(adapter, f"{missing[0]}.lora_A.weight", base, "has no such layer")
    owners = {owner_name(key) for key in adapter.saved}
    return replace(
        config.with_initialization("default"),
        r=adapter.r,
        lora_alpha=adapter.alpha,
        rank_pattern=exact(adapter.rank_pattern, prefix),
        alpha_pattern=exact(adapter.alpha_pattern, prefix),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        target_modules="|".join(re.escape(names[name]) for name in targets),
        exclude_modules=[],
        modules_to_save=sorted(names[owner] for owner in owners if owner in names),
        trainable_token_indices={names.get(name, name): indices for name, indices in adapter.tokens.items()} or None,
        adapter=None,
    )


def _named_tensors(base: nn.Module) -> dict[str, Tensor]:
    tensors = [*base.named_parameters(remove_duplicate=False), *base.named_buffers(remove_duplicate=False)]
    return {without_wrappers(name): tensor for name, tensor in tensors}


def _state_of(part: nn.Module) -> dict[str, Tensor]:
    """The tensors that PEFT saves of a module: its direct parameters and persistent buffers."""
    return {
        key: gather(value).detach()
        for key, value in {**part._parameters, **part._buffers}.items()
        if value is not None and key not in part._non_persistent_buffers_set
    }


def _check_endings(names: list[str], base: nn.Module) -> None:
    """Refuse names that are the ending of another module's name: PEFT's modules_to_save would select both."""
    modules = [without_wrappers(name) for name, _ in base.named_modules()]
    for name in names:
        others = [other for other in modules if other.endswith(name) and other not in names]
        if others:
            raise ValueError(
                f"{name!r} was trained in full, and PEFT would also select {others[0]!r}, whose name ends the same: "
                "its modules_to_save has no form for one alone. Use a Lightning checkpoint, or merge the adapters."
            )


def _check_fits(base: nn.Module, layers: dict[str, LoRALayer], adapter: Adapter) -> None:
    for name, saved in adapter.layers.items():
        key = f"{name}.lora_A.weight"
        layer = layers.get(name)
        if layer is None:
            refuse(adapter, key, base, "has no layer with an adapter there")
        check_sizes(adapter, name, base, layer.out_features, layer.in_features)
        if is_sharded(layer.lora_A) and saved.lora_A.shape != layer.lora_A.shape:
            raise CheckpointMismatchError(
                f"{adapter.source}: key '{PREFIX}{key}' has rank {saved.r}, and the sharded layer keeps "
                f"its rank {layer.r}. Pass adapter=FOLDER to QLoRAPrecision, which loads it before sharding."
            )
        if (saved.magnitude is None) != (layer.lora_magnitude_vector is None):
            dora = layer.lora_magnitude_vector is not None
            refuse(adapter, key, base, f"has use_dora={dora} there, and the adapter use_dora={not dora}")
    indices = token_indices(base)
    for name, rows in adapter.tokens.items():
        if rows != indices.get(name):
            difference = (
                f"is for the rows {shown(rows)}, and trainable_token_indices is {shown(indices.get(name))} there"
            )
            refuse(adapter, f"{name}.{DELTA}", base, difference)
    for tied in tied_names(base):
        check_tie(adapter, tied)
    tensors = _named_tensors(base)
    for key, value in adapter.saved.items():
        if key not in tensors:
            refuse(adapter, key, base, "has no such parameter")
        if tensors[key].shape != value.shape:
            refuse(adapter, key, base, f"has shape {list(tensors[key].shape)} there, the adapter {list(value.shape)}")
