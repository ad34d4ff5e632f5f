"""State dicts of converted modules: what trains, and one entry that says what the rest was.

A layer saves itself whole, as every module does. The hooks of the module that was converted leave out what has a
fingerprint, and add the entry; on loading they compare the fingerprints, and complete the state. A part of the module
has no hooks: its state dict has its base.
"""

import warnings
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_qlora.adapters.peft_layers import describe_base, trained_modules
from lightning_qlora.checkpoints.saved_conversion import SavedConversion, adapter_keys, entry_of, read_conversion
from lightning_qlora.checks import shown
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.derived import Derived
from lightning_qlora.layers.layer_state import (
    LOAD_THE_BASE,
    CheckpointMismatchError,
    SavedLayer,
    base_entries,
    check_same_arguments,
    has_base,
    pop_base,
)
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import CHECKPOINTED, join, owner_name, without_wrappers
from lightning_qlora.starts.starts import corrects_error
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.records import (
    CONVERSION,
    Conversion,
    conversion_of,
    float_buffers,
    has_fingerprint,
    was_frozen,
)
from lightning_qlora.tensors.dtensor import is_sharded, reshard, shard_like
from lightning_qlora.tensors.fingerprint import fingerprint

BUILT_ANEW = (
    "This state dict holds adapters, and this {kind} has none: its adapters were merged, or its layers were built anew "
    "after conversion. Load it before merging, and leave out what builds the layers again (setup, or "
    "on_load_checkpoint that calls it)."
)


class _InModule(str):
    """Goes from the hook before a load to the one after it in torch's list of missing keys: what is not missing."""

    keys: Collection[str] = ()  # of what has a fingerprint, without checkpoint_wrapper's names


def record_conversion(parts: Parts, config: QLoRAConfig, given: QLoRAConfig) -> None:
    """Leave the base out of state dicts of a converted module, and add it on loading, which can be strict.

    `config`: the arguments of the conversion; checkpoint="full" keeps the base. `given`: the arguments as they were
    passed.
    """
    root = parts.root
    parts = Parts(parts.places, (CHECKPOINTED,))  # names as in state dicts
    earlier = [conversion_of(part) for part in parts.modules]
    requests = [request for conversion in earlier if conversion is not None for request in conversion.given]
    buffers = {}
    if any(part._buffers for part in parts.modules):
        buffers = {name: fingerprint(value) for name, value in float_buffers(parts.named)}
    layers: dict[str, Any] = {name: part for name, part in parts.named if hasattr(type(part), "weight_metadata")}
    shapes = {without_wrappers(name): tuple(layer.weight_metadata()[0]) for name, layer in layers.items()}
    vars(root)[CONVERSION] = Conversion(config, [*requests, given], shapes, buffers)
    if _after_state_dict not in root._state_dict_hooks.values():
        # Module-level functions: a module with these hooks can be copied and pickled.
        root.register_state_dict_pre_hook(_before_state_dict)  # type: ignore[no-untyped-call]
        root.register_state_dict_post_hook(_after_state_dict)  # type: ignore[no-untyped-call]
        root.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
        root.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]


def saved_conversion(parts: Parts, config: QLoRAConfig) -> SavedConversion:
    fingerprints: dict[str, int] = {}
    if config.checkpoint == "adapter":
        for name, layer in parts.layers_by_key.items():
            if layer.has_base_of_conversion():
                fingerprints[name] = layer.base_fingerprint()
        for name, owner, key, parameter in parts.dense_parameters:
            if (owner, key) in parts.unchanged and not _is_always_saved(owner, key, parameter):
                fingerprints[name] = parts.unchanged[owner, key]
    trained = trained_modules(parts.base, parts)
    return SavedConversion(config, describe_base(parts, config, trained), fingerprints)


def _is_always_saved(owner: nn.Module, key: str, parameter: nn.Parameter) -> bool:
    """Whether a sharded parameter that is frozen is saved also if conversion saw its value.

    The module itself froze it, as a momentum teacher, so its code may write to it. Without Lightning
    torch.distributed.checkpoint reads the keys of a new module, whose value is that of conversion.
    """
    return is_sharded(parameter) and was_frozen(owner, key) and not isinstance(owner, LoRALayer)  # with its bias


def _before_state_dict(root: nn.Module, prefix: str, _: bool) -> None:
    """Tell layers that their base is left out, which would cost most of the time of a state dict."""
    conversion = conversion_of(root)
    if conversion is None or conversion.config.checkpoint != "adapter":
        return
    for name, layer in root.named_modules(remove_duplicate=False):
        if isinstance(layer, SavedLayer) and layer.has_base_of_conversion():
            layer.base_left_out_at += (prefix + _prefix(name),)


def _after_state_dict(root: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave out what has a fingerprint, and add the conversion."""
    conversion = conversion_of(root)
    if conversion is None:
        return
    parts = _parts_of(root)
    layers = parts.layers_by_key
    for layer in layers.values():
        vars(layer).pop("base_left_out_at", None)
    if _is_merged(conversion, parts):
        return
    saved = saved_conversion(parts, conversion.config)
    inner = _converted_parts(parts)
    if inner:
        _restore_converted_parts(parts, inner, state_dict, prefix)
    for name in saved.fingerprints:  # of a parameter or a layer
        if name not in layers:
            state_dict.pop(prefix + name, None)
        elif has_base(state_dict, prefix + _prefix(name)):
            pop_base(state_dict, prefix + _prefix(name))
    state_dict[prefix + CONVERSION] = entry_of(saved.text())


def _restore_converted_parts(parts: Parts, inner: list[str], state_dict: dict[str, Any], prefix: str) -> None:
    """Add what parts left out that were converted as modules of their own too: this module names its own base."""
    outer = tuple(map(_prefix, inner))
    for name in outer:
        state_dict.pop(prefix + name + CONVERSION, None)
    for name, layer in parts.layers_by_key.items():
        if _prefix(name).startswith(outer):
            for key, value in base_entries(layer, prefix + _prefix(name)).items():
                state_dict.setdefault(key, value)
    for name, _, _, parameter in parts.dense_parameters:
        if name.startswith(outer):
            state_dict.setdefault(prefix + name, parameter.detach())


def _before_load(
    root: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    errors: list[str],
) -> None:
    """Check that a state fits the module, and that the module has the base that the state names."""
    conversion = conversion_of(root)
    if conversion is None:
        return
    in_module = _InModule(prefix + CONVERSION)
    missing_keys.append(in_module)
    parts = _parts_of(root)
    reshard(parts.modules)  # first: `parts` keeps the parameters that it has read
    adapters = _layers_with_adapter(parts, state_dict, prefix)
    if _is_merged(conversion, parts):
        if adapters and prefix + CONVERSION in state_dict:
            raise ValueError(BUILT_ANEW.format(kind=type(root).__name__))
        return
    saved = _read_conversion(parts, state_dict, prefix, conversion.config)
    _check_same_layers(parts, adapters)
    state_dict.pop(prefix + CONVERSION, None)
    if saved is not None:
        _take_arguments(parts, conversion, saved)
        keys, unknown = _check_base(parts, saved)
        keys += [join(name, CONVERSION) for name in _converted_parts(parts)]
        in_module.keys = {without_wrappers(prefix + key, (CHECKPOINTED,)) for key in keys}
        unexpected_keys += [prefix + name for name in unknown]
    elif adapters:
        # A copy from before the conversion of this module, as an average, has the entries of parts that were converted.
        inner = tuple(
            _prefix(name) for name in _converted_parts(parts) if prefix + join(name, CONVERSION) in state_dict
        )
        others = [prefix + key for key in map(_prefix, adapters) if not key.startswith(inner)]
        if not all(has_base(state_dict, key) for key in others):
            missing_keys.append(prefix + CONVERSION)
    else:
        for name, part in parts.places:
            if isinstance(part, Derived):
                part.complete_dense_state(state_dict, prefix + _prefix(name))
    for name, _, _, parameter in parts.parameters:
        key = prefix + name
        if is_sharded(parameter) and key in state_dict:  # it may have the whole parameter
            state_dict[key] = shard_like(state_dict[key], parameter)


def _read_conversion(parts: Parts, state_dict: dict[str, Any], prefix: str, own: QLoRAConfig) -> SavedConversion | None:
    """The conversion in a state dict, also in one whose keys the user moved into a part of a module, or out of one.

    {key.removeprefix("model."): value ...}, or the keys of a model with "model." before them.
    """
    saved = read_conversion(state_dict, prefix, own)
    if saved is None:
        for name, part in parts.places[1:]:
            if prefix + join(name, CONVERSION) in state_dict and conversion_of(part) is None:
                saved = read_conversion(state_dict, prefix + _prefix(name), own)
                del state_dict[prefix + join(name, CONVERSION)]
                return saved and saved.with_names(partial(join, name))
        return None
    names = [without_wrappers(name) for name in saved.fingerprints]
    layers = [without_wrappers(name) for name in parts.layers_by_key]
    if layers and not set(layers) & {*names}:
        outer = next((name.removesuffix(layers[0]) for name in names if name.endswith(f".{layers[0]}")), "")
        return saved.with_names(lambda name: name.removeprefix(outer) if name.startswith(outer) else None)
    return saved


def _check_base(parts: Parts, saved: SavedConversion) -> tuple[list[str], list[str]]:
    """Compare the base with its fingerprints; CheckpointMismatchError if it is another one.

    Returns the keys of what has a fingerprint, and the names that the module does not have.
    """
    # Without the names of wrappers: torch.distributed.checkpoint.state_dict removes them from keys.
    layers = {without_wrappers(name): (name, layer) for name, layer in parts.layers_by_key.items()}
    parameters = {without_wrappers(parameter.name): parameter for parameter in parts.dense_parameters}
    numbers: dict[int, int] = {}  # tied parameters are read once
    keys = []
    unknown = []
    for name, expected in saved.fingerprints.items():
        plain_name = without_wrappers(name)
        if plain_name in layers:
            own_name, layer = layers[plain_name]
            keys.append(join(own_name, "weight"))
            fits = expected == layer.base_fingerprint()
        elif plain_name in parameters:
            parameter = parameters[plain_name]
            keys.append(parameter.name)
            fits = has_fingerprint(expected, *parameter[1:], numbers)
        else:
            unknown.append(name)
            continue
        if not fits:
            raise CheckpointMismatchError(
                f"{name or 'the module itself'}: the checkpoint was trained on another base weight (its fingerprint "
                f"is {expected:x}). {LOAD_THE_BASE}"
            )
    return keys, unknown


def _after_load(root: nn.Module, incompatible_keys: Any) -> None:
    """What has a fingerprint is not missing."""
    conversion = conversion_of(root)
    if conversion is None:
        return
    missing: list[str] = incompatible_keys.missing_keys
    marks = [key for key in missing if isinstance(key, _InModule)]  # those of modules around this one come first
    if marks:
        is_there = marks[-1].keys
        missing[:] = [
            key for key in missing if key is not marks[-1] and without_wrappers(key, (CHECKPOINTED,)) not in is_there
        ]


def _layers_with_adapter(parts: Parts, state_dict: Mapping[str, Any], prefix: str) -> set[str]:
    adapters = {key.removeprefix(prefix) for key in adapter_keys(state_dict)}
    return {owner_name(key) for key in adapters - {parameter.name for parameter in parts.dense_parameters}}


def _check_same_layers(parts: Parts, saved: set[str]) -> None:
    layers = parts.layers_by_key.keys()
    if saved and saved != layers:
        name = min(saved ^ layers)
        difference = "has adapter in the checkpoint, has none here"
        if name in layers:
            difference = "has no adapter in the checkpoint, has one here"
        raise CheckpointMismatchError(
            f"{name or 'the module itself'}: {difference} ({len(saved ^ layers)} of {len(saved | layers)} layers "
            "differ). Convert with the same target_modules, exclude_modules and r as the checkpoint's."
        )


def _take_arguments(parts: Parts, conversion: Conversion, saved: SavedConversion) -> None:
    """Refuse arguments that change what the adapters compute, but not their shapes; take those of the initialization.

    The initialization decides which base the adapters fit.
    """
    saved_tokens = saved.base.get("tokens", {})
    if (saved_tokens or parts.rows_that_train) and saved_tokens != parts.base.rows_that_train:
        here = shown(parts.base.rows_that_train)
        raise CheckpointMismatchError(
            f"trainable_token_indices is {shown(saved_tokens)} in the checkpoint and {here} here, by names of "
            "embeddings. Set it to the value of the checkpoint."
        )
    of_layers = saved.base["layers"]
    layers = parts.base.layers if of_layers else parts.layers  # their names do not matter if all have the same
    arguments = {layer: vars(saved.config) | of_layers.get(name, {}) for name, layer in layers.items()}
    for layer, of_layer in arguments.items():
        check_same_arguments(layer, of_layer)
    in_folder = {}  # whose initialization the arguments do not name
    if saved.quantization is not None and corrects_error(saved.quantization):
        in_folder = {"init_lora_weights": saved.quantization.init_lora_weights}
    for layer, of_layer in arguments.items():
        method = (of_layer | in_folder)["init_lora_weights"]
        if method != layer.config.init_lora_weights:
            layer.config = layer.config.changed(init_lora_weights=method)
    method = saved.config.init_lora_weights
    if method != conversion.config.init_lora_weights:
        warnings.warn(
            f"The adapters of the checkpoint were initialized as {method!r}, so init_lora_weights="
            f"{conversion.config.init_lora_weights!r} is not used.",
            stacklevel=2,
        )
        conversion.config = conversion.config.changed(init_lora_weights=method)


def _parts_of(root: nn.Module) -> Parts:
    """With the names of state dicts, which torch.compile's wrapper is in, and checkpoint_wrapper is not."""
    return Parts(root.named_modules(remove_duplicate=False), (CHECKPOINTED,))


def _prefix(name: str) -> str:
    """What the keys of a module of this name begin with."""
    return f"{name}." if name else ""


def _converted_parts(parts: Parts) -> list[str]:
    """Names of the parts that were converted as a module of their own too."""
    return [name for name, part in parts.places if name and conversion_of(part) is not None]


def _is_merged(conversion: Conversion, parts: Parts) -> bool:
    """Whether its layers were merged, so that its state dict is that of a dense module."""
    return bool(conversion.layers) and not parts.layers
