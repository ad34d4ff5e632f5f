"""State dicts of converted modules: what trains, fingerprints of the rest, and the arguments of the conversion."""

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.adapters.base_compatibility import check_quantization, record_initialization, required_base
from lightning_qlora.adapters.base_model import config_of_layer, describe_base, find_base_model, seed_name_of
from lightning_qlora.checks import shown
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.dtensor import reshard, shard_like
from lightning_qlora.layers.fingerprint import fingerprint, fingerprint_entry, fingerprint_of_entry
from lightning_qlora.layers.layer_state import FINGERPRINT, LOAD_THE_BASE, CheckpointMismatchError
from lightning_qlora.layers.lora_layer import ADAPTER
from lightning_qlora.layers.names import join, key_name, last_part, owner_name, plain_name
from lightning_qlora.layers.packed_linear import BASE
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.layers.records import fingerprint_of, frozen_value, is_base, renew, unrecorded
from lightning_qlora.layers.trainable_tokens import DELTA, TrainableTokens, token_indices

CONVERSION = "_qlora_conversion"  # attribute of a converted module: its `Conversion`
HOOKED = "_qlora_hooked"  # attribute of a module that has the hooks of this file
CONFIG_KEY = "qlora_config"  # key of the conversion's arguments, the bytes of JSON in an int32 tensor
BASE_MODEL = "base_model"  # key in that JSON of what `describe_base` returns
DESCRIPTION_TYPES: dict[str, type] = {  # types of entries of `describe_base`
    "prefix": str,
    "trained_in_full": list,
    "layers": dict,
    "seed_names": dict,
    "experts": dict,
    "tokens": dict,
}
PAGE = 4096  # bytes: the JSON is padded, because a sharded checkpoint loads into tensors of the same size


@dataclass
class Conversion:
    """The record of a conversion in the module that was converted.

    Attributes:
        config: The arguments that checkpoints hold; an adapter that was loaded changes them.
        given: The arguments of every call that converted the module or a part of it, as they were passed; the last ones
            are those of this conversion.
        layers: Shape of each layer with an adapter, and of each embedding with rows that train, by name.
        buffers: Float buffer -> its fingerprint at conversion; adapter folders do not contain changed buffers.
        replaced: Whether the state dict that is being loaded holds a dense base.
    """

    config: QLoRAConfig
    given: list[QLoRAConfig]
    layers: dict[str, tuple[int, ...]]
    buffers: dict[str, int]
    replaced: bool = False


def conversion_of(module: nn.Module) -> Conversion | None:
    """The conversion of a module; None if it is not converted, or only as a part of another module."""
    return vars(module).get(CONVERSION)


def forget_conversion(module: nn.Module) -> None:
    """Remove the record, so that the module can be converted again; converted layers stay."""
    vars(module).pop(CONVERSION, None)


def use_adapter_state_dict(root: nn.Module, config: QLoRAConfig, given: QLoRAConfig) -> None:
    """Leave the base out of state dicts of a converted module, and add it on loading, which can be strict.

    The state dict of a part of the module has the base of that part, which may be saved alone. `config`: the arguments
    of the conversion; checkpoint="full" keeps the base. `given`: the arguments as they were passed.
    """
    requests = []
    for _, conversion in _conversions(root):
        requests += conversion.given
    buffers = {name: fingerprint(value) for name, value in float_buffers(root)}
    conversion = Conversion(config, [*requests, given], _shapes_of_layers(root), buffers)
    root._qlora_conversion = conversion  # type: ignore[assignment]
    for part in root.modules():
        if HOOKED not in vars(part) and (part is root or adapted_layers(part)):
            vars(part)[HOOKED] = True
            # Module-level functions: a module with these hooks can be copied and pickled.
            part.register_state_dict_post_hook(_after_state_dict)  # type: ignore[no-untyped-call]
            part.register_load_state_dict_pre_hook(_before_load)  # type: ignore[no-untyped-call]
            part.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]


def check_no_layer_resized(root: nn.Module) -> None:
    """RuntimeError if a layer that trains was replaced by a dense layer of another shape.

    `resize_token_embeddings` of transformers replaces an output embedding so, and its adapter would be lost.
    """
    conversion = conversion_of(root)
    if conversion is None:
        return
    layers = {plain_name(name): part for name, part in root.named_modules()}
    for name, shape in conversion.layers.items():
        layer = layers.get(name)
        if layer is None or isinstance(layer, TrainableTokens):
            continue
        weight = layer._parameters.get("weight")
        if weight is not None and weight.shape != shape:
            raise RuntimeError(
                f"{name}: a {type(layer).__name__} of shape {list(weight.shape)} took the place of the layer that was "
                f"converted, of shape {list(shape)}, and its adapter is lost. Change the model before it is converted; "
                "for resize_token_embeddings, one that is quantized while it loads, before it is saved."
            )


def _shapes_of_layers(root: nn.Module) -> dict[str, tuple[int, ...]]:
    layers: dict[str, Any] = adapted_layers(root)
    layers |= {name: part for name, part in root.named_modules() if isinstance(part, TrainableTokens)}
    return {plain_name(name): tuple(layer.weight_metadata()[0]) for name, layer in layers.items()}


def float_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of the float buffers in state dicts, such as the statistics of BatchNorm."""
    for name, part in module.named_modules():
        for key, value in part.named_buffers(recurse=False):
            dense = value.is_floating_point() and value.layout is torch.strided and not value.is_meta
            if dense and key not in vars(part).get("_non_persistent_buffers_set", ()):
                yield join(name, key), value


def conversion_text(root: nn.Module) -> str | None:
    """The arguments of the conversion and the base model, as JSON; None for a module that is not converted."""
    conversion = conversion_of(root)
    if conversion is None or _is_merged(root):
        return None
    return _conversion_text(root, conversion.config)


def _conversion_text(root: nn.Module, config: QLoRAConfig) -> str:
    arguments = asdict(config)
    arguments["adapter"] = None  # a folder that is read once, at conversion
    arguments[BASE_MODEL] = describe_base(root, config)
    return json.dumps(arguments)


def config_entry(text: str) -> Tensor:
    """The value of `CONFIG_KEY` in a state dict, from the text of `conversion_text`."""
    encoded = text.encode()
    encoded += b" " * (-len(encoded) % PAGE)
    return torch.tensor(list(encoded), dtype=torch.int32, device="cpu")  # 32 bits: a sum over state dicts fits


def read_conversion(state_dict: Mapping[str, Any], prefix: str = "") -> tuple[QLoRAConfig | None, dict[str, Any]]:
    """The arguments of the conversion, and the result of `describe_base`, in a state dict.

    (None, {}) if the module is not converted. Raises ValueError if the entry is damaged.
    """
    key = prefix + CONFIG_KEY
    if key not in state_dict:
        return None, {}
    try:
        # contiguous() loads the tensors of Lightning's lazily loaded checkpoints.
        arguments = {**json.loads(bytes(state_dict[key].contiguous().double().round().to(torch.uint8).tolist()))}
        description = {**arguments.pop(BASE_MODEL, {})}
        for name, expected in DESCRIPTION_TYPES.items():
            if not isinstance(description.get(name, expected()), expected):
                raise TypeError(f"{name}={shown(description[name])}: must be a {expected.__name__}.")
        check_quantization(description.get("quantization"), "quantization")
        layers = description.get("layers", {}).values()
        for layer_arguments in {json.dumps(value): value for value in layers}.values():  # each once
            QLoRAConfig(**layer_arguments)
        return QLoRAConfig(**arguments), description
    except Exception as error:  # a damaged value may raise any error
        raise ValueError(
            f"{key}: is damaged, or of a newer version of lightning-qlora ({error}). Use another copy, or that version."
        ) from error


def saved_layers(state_dict: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of each layer with an adapter in a state dict -> its arguments that differ from those of the module."""
    prefix = description.get("prefix", "")
    arguments = {join(prefix, name): value for name, value in description.get("layers", {}).items()}
    keys = [plain_name(key) for key in state_dict]
    names = [owner_name(key) for key in keys if last_part(key) == "lora_A"]
    return {name: arguments.get(name, {}) for name in names}


def _after_state_dict(root: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Replace frozen parameters by their fingerprints, and add the arguments of the conversion."""
    check_no_layer_resized(root)
    if not _is_outermost(root, prefix):
        return
    conversion = conversion_of(root)
    if conversion is None:  # a part that is saved alone
        config = replace(next(iter(adapted_layers(root).values())).config, checkpoint="full")
        for name, layer in _named_modules(root):
            key = prefix + join(name, "weight")
            if isinstance(layer, QLoRALinear) and state_dict.pop(f"{key}.{FINGERPRINT}", None) is not None:
                entries = layer.packed_weight.bnb_state_dict(key)  # all ranks gather a sharded weight
                state_dict.update({name: value.clone() for name, value in entries.items()})  # may be written to
    else:
        config = conversion.config
    if config.checkpoint == "adapter":
        for name, owner, key, parameter in _dense_parameters(root):
            if prefix + name in state_dict and is_base(owner, key, parameter):
                del state_dict[prefix + name]
                record = frozen_value(owner, key)
                assert record is not None
                state_dict[f"{prefix}{name}.{FINGERPRINT}"] = fingerprint_entry(record.fingerprint)
    state_dict[prefix + CONFIG_KEY] = config_entry(_conversion_text(root, config))
    for name, _conversion in _conversions(root):
        if name:  # a part that was converted alone: the entry of the root covers it
            state_dict.pop(f"{prefix}{name}.{CONFIG_KEY}", None)


def _before_load(root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Check that a state fits the module, and complete it with the frozen parameters of the module."""
    if not prefix and state_dict.get(CONFIG_KEY) is not None:
        _convert_new_layers(root, state_dict)
    if state_dict.get(prefix + CONFIG_KEY, "") is None:  # the hook of an outer module prepared this part
        del state_dict[prefix + CONFIG_KEY]
        return
    if not _is_outermost(root, prefix):
        return
    reshard(root)
    conversion = conversion_of(root)
    if conversion is not None:
        conversion.replaced = not any(key.endswith("." + FINGERPRINT) for key in state_dict)
    _check_same_layers(root, state_dict, prefix)
    saved, description = read_conversion(state_dict, prefix)
    state_dict.pop(prefix + CONFIG_KEY, None)
    if saved is not None:
        _check_same_function(root, saved, description)
        _keep_initialization(root, saved, description)
    for name, _conversion in _conversions(root):
        if name:  # tells the hook of a part that was converted alone that this call prepares it
            state_dict[f"{prefix}{name}.{CONFIG_KEY}"] = None
    fingerprints: dict[int, int] = {}  # of tied parameters once
    for name, owner, key, parameter in _dense_parameters(root):
        value = state_dict.pop(f"{prefix}{name}.{FINGERPRINT}", None)
        if value is None:
            continue
        if id(parameter) not in fingerprints:
            fingerprints[id(parameter)] = fingerprint_of(owner, key, parameter)
        expected = fingerprint_of_entry(value)
        current = fingerprints[id(parameter)]
        if expected != current:
            raise CheckpointMismatchError(
                f"{name}: the checkpoint was trained on another base model (this frozen parameter has fingerprint "
                f"{expected:x} there, {current:x} here). {LOAD_THE_BASE}"
            )
        state_dict[prefix + name] = parameter.detach()
    if saved is None:  # of the dense module: rows that train begin with its values
        for name, part in _named_modules(root):
            key = prefix + join(name, "weight")
            if isinstance(part, TrainableTokens) and key in state_dict:
                state_dict.setdefault(prefix + join(name, DELTA), state_dict[key][part.token_adapter.token_indices])
    for name, parameter in root.named_parameters(remove_duplicate=False):
        name = key_name(name)
        if prefix + name in state_dict:  # the whole parameter, also if the module has a shard
            state_dict[prefix + name] = shard_like(state_dict[prefix + name], parameter)


def _convert_new_layers(root: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Convert layers that replaced converted ones before a Trainer restores a checkpoint.

    `on_load_checkpoint` may call `setup` again, which builds the model again.
    """
    conversion = conversion_of(root)
    adapters = {owner_name(key) for key in state_dict if last_part(key) == "lora_A"}
    if conversion is None or adapters <= {key_name(name) for name in adapted_layers(root)}:
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


def _check_same_layers(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    saved = {owner_name(key[len(prefix) :]) for key in state_dict if last_part(key) == "lora_A"}
    # A shared layer is in a state dict under each of its names.
    layers = {name for name, layer in _named_modules(root) if isinstance(layer, QLoRALinear)}
    if saved and saved != layers:
        name = min(saved ^ layers)
        difference = "has adapter in the checkpoint, has none here"
        if name in layers:
            difference = "has no adapter in the checkpoint, has one here"
        raise CheckpointMismatchError(
            f"{name or 'the module itself'}: {difference} ({len(saved ^ layers)} of {len(saved | layers)} layers "
            "differ). Convert with the same target_modules, exclude_modules and r as the checkpoint's."
        )


def _check_same_function(root: nn.Module, saved: QLoRAConfig, description: dict[str, Any]) -> None:
    """Refuse arguments that change what the adapters compute, but not their shapes."""
    _, base = find_base_model(root)
    saved_tokens = description.get("tokens", {})
    tokens = token_indices(base)
    if saved_tokens != tokens:
        raise CheckpointMismatchError(
            f"trainable_token_indices is {shown(saved_tokens)} in the checkpoint and {shown(tokens)} here, by names of "
            "embeddings. Set it to the value of the checkpoint."
        )
    for name, full_name, layer in _layers_of_base(root):
        saved_config = config_of_layer(description, name, saved)
        for argument in ("use_rslora", "use_dora", "lora_alpha"):
            expected = getattr(saved_config, argument)
            value = getattr(layer.config, argument)
            if value != expected:
                raise CheckpointMismatchError(
                    f"{full_name}: {argument} is {expected!r} in the checkpoint and {value!r} here: the adapters would "
                    "compute something else than in training. Set it (lora_alpha also by alpha_pattern) to the value "
                    "of the checkpoint."
                )


def _keep_initialization(root: nn.Module, saved: QLoRAConfig, description: dict[str, Any]) -> None:
    """Store how the adapters of a checkpoint were initialized: this decides which base they fit."""
    quantization = description.get("quantization")
    for name, _, layer in _layers_of_base(root):
        layer.seed_name = seed_name_of(description, name)
        if required_base(quantization):
            # The arguments do not name the initialization of adapters that came from a folder.
            record_initialization(layer, quantization)
        else:
            record_initialization(layer, vars(config_of_layer(description, name, saved)))
    conversion = conversion_of(root)
    if conversion is None:
        return
    config = conversion.config.with_initialization(saved.init_lora_weights, saved.loftq_config)
    if config != conversion.config:
        warnings.warn(
            f"The adapters of the checkpoint were initialized as {saved.init_lora_weights!r}, so init_lora_weights="
            f"{conversion.config.init_lora_weights!r} is not used.",
            stacklevel=2,
        )
        conversion.config = config


def _layers_of_base(root: nn.Module) -> list[tuple[str, str, QLoRALinear]]:
    """Name in the base model, name in the module, and layer."""
    prefix, base = find_base_model(root)
    layers = adapted_layers(base).items()
    return [(plain_name(name), join(prefix, name), layer) for name, layer in layers]


def _named_modules(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules under each of their names in state dicts."""
    return [(key_name(name), part) for name, part in root.named_modules(remove_duplicate=False)]


def _conversions(root: nn.Module) -> Iterator[tuple[str, Conversion]]:
    """Name and conversion of a module and of its parts, under each of their names."""
    for name, part in _named_modules(root):
        conversion = conversion_of(part)
        if conversion is not None:
            yield name, conversion


def _is_outermost(root: nn.Module, prefix: str) -> bool:
    """Whether a state dict with this prefix is that of the whole module, or of a part that is saved alone."""
    return not _is_merged(root) and (conversion_of(root) is not None or not prefix)


def _is_merged(root: nn.Module) -> bool:
    """Whether the adapters were merged: the state dict is that of a dense module."""
    conversion = conversion_of(root)
    return (conversion is None or bool(conversion.layers)) and not adapted_layers(root)


def _dense_parameters(root: nn.Module) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    """Name, owner, key and value of the parameters that QLoRALinear does not save, under each of their names."""
    parameters = []
    for name, owner in _named_modules(root):
        for key, parameter in owner._parameters.items():
            if parameter is not None and not (isinstance(owner, QLoRALinear) and key in (*BASE, *ADAPTER)):
                parameters.append((join(name, key), owner, key, parameter))
    return parameters
