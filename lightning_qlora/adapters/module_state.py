"""State dicts of converted modules: what trains, and one entry that says what the rest was.

The hooks of the outermost module that has them write and read that entry. Where this is a part of a converted module,
saved alone or in a module that is not converted, it has its base with it.
"""

import threading
import warnings
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from lightning_qlora.adapters.base_compatibility import record_initialization, required_base
from lightning_qlora.adapters.base_model import config_of_layer, describe_base, find_base_model, trained_in_full
from lightning_qlora.adapters.conversion import (
    CONVERSION,
    Conversion,
    SavedConversion,
    check_no_layer_resized,
    conversion_of,
    entry_of,
    float_buffers,
    read_conversion,
    shapes_of_layers,
)
from lightning_qlora.checks import shown
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.dtensor import is_sharded, local, of_all_ranks, reshard, shard_like
from lightning_qlora.layers.fingerprint import fingerprint
from lightning_qlora.layers.layer_state import LOAD_THE_BASE, CheckpointMismatchError, base_entries, has_base
from lightning_qlora.layers.lora_layer import ADAPTER, LoRALayer
from lightning_qlora.layers.names import CHECKPOINTED, join, key_name, last_part, owner_name, plain_name
from lightning_qlora.layers.packed_linear import BASE
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.layers.records import base_fingerprints, current_fingerprint, renew, unrecorded
from lightning_qlora.layers.trainable_tokens import DELTA, TrainableTokens, token_adapters, token_indices

PREPARED = torch.empty(0, device="cpu")  # in place of a part's entry: the hook of an outer module prepared the part


class _Saving(threading.local):
    """The ids of the outermost modules whose state dicts a thread makes."""

    def __init__(self) -> None:
        self.modules: list[int] = []


_saving = _Saving()


def use_adapter_state_dict(root: nn.Module, config: QLoRAConfig, given: QLoRAConfig) -> None:
    """Leave the base out of state dicts of a converted module, and add it on loading, which can be strict.

    The state dict of a part of the module has the base of that part, which may be saved alone. `config`: the arguments
    of the conversion; checkpoint="full" keeps the base. `given`: the arguments as they were passed.
    """
    requests = []
    for part in root.modules():
        earlier = conversion_of(part)
        if earlier is not None:
            requests += earlier.given
    buffers = {name: fingerprint(value) for name, value in float_buffers(root)}
    conversion = Conversion(config, [*requests, given], shapes_of_layers(root), buffers)
    root._qlora_conversion = conversion  # type: ignore[assignment]
    for part in root.modules():
        is_part = CHECKPOINTED not in part._modules and adapted_layers(part)  # state dicts name no checkpoint_wrapper
        if not _has_hooks(part) and (part is root or is_part):
            # Module-level functions: a module with these hooks can be copied and pickled.
            part.register_state_dict_pre_hook(_before_state_dict)  # type: ignore[no-untyped-call]
            part.register_state_dict_post_hook(_after_state_dict)  # type: ignore[no-untyped-call]
            part.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
            part.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]


def _has_hooks(module: nn.Module) -> bool:
    return _after_state_dict in module._state_dict_hooks.values()


def saved_conversion(root: nn.Module, config: QLoRAConfig) -> SavedConversion:
    """What a checkpoint says about a module."""
    fingerprints: dict[str, int] = {}
    unchanged = base_fingerprints(root)
    if config.checkpoint == "adapter":
        for name, layer in _named_layers(root):
            # A base that depends on the last bits of an SVD can't be computed again on another machine.
            if layer.config.can_repeat_base:
                fingerprints[name] = layer.base_fingerprint()
        for name, owner, key, _ in _dense_parameters(root):
            if (owner, key) in unchanged:
                fingerprints[name] = unchanged[owner, key]
    return SavedConversion(config, describe_base(root, config, trained_in_full(root, unchanged)), fingerprints)


def _before_state_dict(root: nn.Module, prefix: str, _: Any) -> None:
    """Remember a module if it is the outermost one; a state dict may be made while that of another module is."""
    outermost: list[int] = _saving.modules
    if not outermost or not prefix:
        outermost.append(id(root))


def _after_state_dict(root: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave out what has a fingerprint, write other 4-bit weights in bitsandbytes' format, and add the conversion."""
    outermost: list[int] = _saving.modules
    is_outermost = outermost[-1:] == [id(root)]
    if is_outermost:
        outermost.pop()
    check_no_layer_resized(root)
    if not is_outermost or _is_merged(root):
        return
    conversion = conversion_of(root)
    if conversion is None:  # a part, alone or in a module that is not converted
        config = replace(next(iter(adapted_layers(root).values())).config, checkpoint="full")
    else:
        config = conversion.config
    saved = saved_conversion(root, config)
    for name in saved.fingerprints:
        state_dict.pop(prefix + name, None)
    for name, layer in _named_layers(root):
        if name not in saved.fingerprints:
            entries = base_entries(layer, prefix + join(name, "weight"))  # all ranks gather it
            if conversion is None:  # may be written to
                entries = {key: value.clone() for key, value in entries.items()}
            state_dict.update(entries)
    state_dict[prefix + CONVERSION] = entry_of(saved.text())


def _before_load(root: nn.Module, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
    """Check that a state fits the module, and complete it with the frozen parameters of the module."""
    _, _, missing_keys, unexpected_keys, _ = arguments
    if not prefix and state_dict.get(CONVERSION) is not None:
        _convert_new_layers(root, state_dict)
    if state_dict.get(prefix + CONVERSION) is PREPARED:
        del state_dict[prefix + CONVERSION]
        return
    if _is_merged(root):
        return
    reshard(root)
    adapters = _layers_with_adapter(state_dict, prefix)
    _check_same_layers(root, adapters)
    saved = read_conversion(state_dict, prefix)
    state_dict.pop(prefix + CONVERSION, None)
    conversion = conversion_of(root)
    if conversion is not None:
        conversion.replaced = saved is None or not saved.fingerprints
    for name, part in _named_modules(root):
        if name and _has_hooks(part):
            state_dict[f"{prefix}{name}.{CONVERSION}"] = PREPARED
    if saved is not None:
        _check_same_function(root, saved)
        _keep_initialization(root, saved)
        unexpected_keys += [prefix + name for name in _check_base(root, saved, state_dict, prefix)]
        # A layer that is loaded alone took its weight before this hook.
        without_base = [prefix + join(name, "weight") for name in adapters if name and name not in saved.fingerprints]
        missing_keys += [key for key in without_base if not has_base(state_dict, key)]
    elif adapters:
        missing_keys.append(prefix + CONVERSION)
    else:
        _begin_with_rows_of_dense_module(root, state_dict, prefix)
    for name, parameter in root.named_parameters(remove_duplicate=False):
        name = key_name(name)
        if prefix + name in state_dict:  # the whole parameter, also if the module has a shard
            state_dict[prefix + name] = shard_like(state_dict[prefix + name], parameter)


def _begin_with_rows_of_dense_module(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Let the rows that train begin with the values in a state of the dense module."""
    for name, part in _named_modules(root):
        key = prefix + join(name, "weight")
        if isinstance(part, TrainableTokens) and key in state_dict:
            rows = state_dict[key][part.token_adapter.token_indices]
            state_dict.setdefault(prefix + join(name, DELTA), rows)


def _check_base(root: nn.Module, saved: SavedConversion, state_dict: dict[str, Any], prefix: str) -> list[str]:
    """Compare the base with its fingerprints, and complete the state with what has one.

    Returns the names that the module does not have. Raises CheckpointMismatchError if the base is another one.
    """
    layers = dict(_named_layers(root))
    parameters = {name: (owner, key, parameter) for name, owner, key, parameter in _dense_parameters(root)}
    numbers: dict[int, int] = {}  # tied parameters are read once
    unknown = []
    for name, expected in saved.fingerprints.items():
        if name in layers:
            current = layers[name].base_fingerprint()
        elif name in parameters:
            owner, key, parameter = parameters[name]
            state_dict[prefix + name] = parameter.detach()
            current = current_fingerprint(owner, key, parameter, numbers)
        else:
            unknown.append(name)
            continue
        if current != expected:
            raise CheckpointMismatchError(
                f"{name or 'the module itself'}: the checkpoint was trained on another base weight (fingerprint "
                f"{expected:x} there, {current:x} here). {LOAD_THE_BASE}"
            )
    return unknown


def _convert_new_layers(root: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Convert layers that replaced converted ones before a Trainer restores a checkpoint.

    `on_load_checkpoint` may call `setup` again, which builds the model again.
    """
    conversion = conversion_of(root)
    adapters = {owner_name(key) for key in state_dict if last_part(key) == "lora_A"}
    if conversion is None or adapters <= {name for name, layer in _named_modules(root) if isinstance(layer, LoRALayer)}:
        return
    trainer: Any = vars(root).get("_trainer")
    convert = getattr(getattr(trainer, "precision_plugin", None), "convert_again", None)
    if convert is not None and not trainer.strategy.restore_checkpoint_after_setup and unrecorded(root):
        convert(root)
    elif conversion.layers and not adapted_layers(root):
        raise ValueError(
            f"This state dict holds adapters, and the layers of this {type(root).__name__} were built anew after "
            "conversion, so it has none. Leave out what builds them again (setup, or on_load_checkpoint that calls it)."
        )


def _after_load(root: nn.Module, _: Any) -> None:
    """Record the parameters as the base if they were loaded from a checkpoint of the dense module."""
    conversion = conversion_of(root)
    if conversion is not None and conversion.replaced and not _is_merged(root):
        conversion.replaced = False
        renew(root)


def _layers_with_adapter(state_dict: Mapping[str, Any], prefix: str) -> set[str]:
    return {owner_name(key[len(prefix) :]) for key in state_dict if last_part(key) == "lora_A"}


def _check_same_layers(root: nn.Module, saved: set[str]) -> None:
    layers = {name for name, _ in _named_layers(root)}
    if saved and saved != layers:
        name = min(saved ^ layers)
        difference = "has adapter in the checkpoint, has none here"
        if name in layers:
            difference = "has no adapter in the checkpoint, has one here"
        raise CheckpointMismatchError(
            f"{name or 'the module itself'}: {difference} ({len(saved ^ layers)} of {len(saved | layers)} layers "
            "differ). Convert with the same target_modules, exclude_modules and r as the checkpoint's."
        )


def _check_same_function(root: nn.Module, saved: SavedConversion) -> None:
    """Refuse arguments that change what the adapters compute, but not their shapes."""
    _, base = find_base_model(root)
    saved_tokens = saved.base.get("tokens", {})
    tokens = token_indices(base)
    if saved_tokens != tokens:
        raise CheckpointMismatchError(
            f"trainable_token_indices is {shown(saved_tokens)} in the checkpoint and {shown(tokens)} here, by names of "
            "embeddings. Set it to the value of the checkpoint."
        )
    for name, full_name, layer in _layers_of_base(root):
        saved_config = config_of_layer(saved.base, name, saved.config)
        for argument in ("use_rslora", "use_dora", "lora_alpha"):
            expected = getattr(saved_config, argument)
            value = getattr(layer.config, argument)
            if value != expected:
                raise CheckpointMismatchError(
                    f"{full_name}: {argument} is {expected!r} in the checkpoint and {value!r} here: the adapters would "
                    "compute something else than in training. Set it (lora_alpha also by alpha_pattern) to the value "
                    "of the checkpoint."
                )


def _keep_initialization(root: nn.Module, saved: SavedConversion) -> None:
    """Store how the adapters of a checkpoint were initialized: this decides which base they fit."""
    quantization = saved.base.get("quantization")
    for name, _, layer in _layers_of_base(root):
        if required_base(quantization):
            # The arguments do not name the initialization of adapters that came from a folder.
            record_initialization(layer, quantization)
        else:
            record_initialization(layer, vars(config_of_layer(saved.base, name, saved.config)))
    conversion = conversion_of(root)
    if conversion is None:
        return
    method = saved.config.init_lora_weights
    config = conversion.config.with_initialization(method, saved.config.loftq_config)
    if config != conversion.config:
        warnings.warn(
            f"The adapters of the checkpoint were initialized as {method!r}, so init_lora_weights="
            f"{conversion.config.init_lora_weights!r} is not used.",
            stacklevel=2,
        )
        conversion.config = config


def _layers_of_base(root: nn.Module) -> list[tuple[str, str, LoRALayer]]:
    """Name in the base model, name in the module, and layer."""
    prefix, base = find_base_model(root)
    layers = adapted_layers(base).items()
    return [(plain_name(name), join(prefix, name), layer) for name, layer in layers]


def _named_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules under each of their names in state dicts."""
    return [(key_name(name), part) for name, part in root.named_modules(remove_duplicate=False)]


def _named_layers(root: nn.Module) -> list[tuple[str, LoRALayer]]:
    """4-bit layers under each of their names in state dicts: a shared layer has several."""
    return [(name, part) for name, part in _named_modules(root) if isinstance(part, LoRALayer)]


def _is_merged(root: nn.Module) -> bool:
    """Whether the adapters were merged: the state dict is that of a dense module."""
    conversion = conversion_of(root)
    return (conversion is None or bool(conversion.layers)) and not adapted_layers(root)


def _dense_parameters(root: nn.Module) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    """Name, owner, key and value of the parameters that layers do not save, under each of their names."""
    parameters = []
    for name, owner in _named_modules(root):
        for key, parameter in owner._parameters.items():
            if parameter is not None and not (isinstance(owner, LoRALayer) and key in (*BASE, *ADAPTER)):
                parameters.append((join(name, key), owner, key, parameter))
    return parameters


def check_finite(module: nn.Module) -> None:
    """Raise ValueError if an adapter of a module holds NaN or Inf; all ranks of a sharded module must call it.

    Such adapters are neither saved nor merged: the model would compute NaN, and readers refuse the file.
    """
    layers: dict[str, Any] = adapted_layers(module) | token_adapters(module)
    parameters = {name: list(layer.adapter_parameters()) for name, layer in layers.items()}
    bad = [name for name in layers if not all(torch.isfinite(local(p.detach())).all() for p in parameters[name])]
    if any(map(is_sharded, chain.from_iterable(parameters.values()))):
        bad = list(dict.fromkeys(chain.from_iterable(of_all_ranks(bad))))
    if bad:
        trainer = vars(module).get("_trainer")
        step = ""
        if trainer is not None:
            step = f" after step {trainer.global_step}"
        raise ValueError(
            f"{bad[0] or type(module).__name__}: its adapter holds NaN or Inf{step}, as those of {len(bad)} of "
            f"{len(layers)} layers: the training diverged. Nothing was written, and earlier files stay. Go on from an "
            "earlier checkpoint, with a smaller learning rate, or compute_dtype='bf16' in place of fp16; look for NaN "
            "in the batches."
        )
