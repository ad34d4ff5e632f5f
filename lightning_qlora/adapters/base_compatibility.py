"""Which base model an adapter fits, and the same adapter for the base in 16 or 32 bits.

    default, gaussian     B = 0 at first: also fits the base in 16 or 32 bits, where the outputs differ from training
    loftq, calibrated     initialized from the quantization error: fits the base quantized in the same way
    pissa, iterated loftq the initialization changed the 4-bit weights: fits only these

Checkpoints and adapter folders store the dict that `quantization_of` returns. Loading an adapter records it in the
layers (`record_initialization`), so that the module can be saved again.
"""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_qlora.adapters.adapter import MAGNITUDE, Adapter, State
from lightning_qlora.checks import DAMAGED, check_bool
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.initializations import INITIALIZATIONS, split_name
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.lora_layer import LoRALayer

BITS = ("quant_type", "block_size", "double_quant")  # the arguments `of_base`, in the order of files


def quantization_of(config: QLoRAConfig) -> dict[str, Any]:
    """How the base is quantized and how its adapters are initialized; plain values, stored in files."""
    quantization = {name: getattr(config, name) for name in (*BITS, "init_lora_weights")}
    quantization["base_changed"] = config.changes_base
    if config.loftq_config:
        quantization["loftq_config"] = dict(config.loftq_config)
    return quantization


def check_quantization(quantization: Any, source: str) -> None:
    """Raise ValueError, with the source, if a value is neither None nor what `quantization_of` returns."""
    if quantization is None:
        return
    try:
        check_bool("base_changed", quantization["base_changed"])
        arguments = {name: quantization[name] for name in (*BITS, "init_lora_weights")}
        QLoRAConfig(**arguments, loftq_config=quantization.get("loftq_config"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}. {DAMAGED}") from error


def quantization_of_layer(layer: LoRALayer) -> dict[str, Any]:
    """The same for a layer, with the type of its weight, which may have been loaded in 4 bits."""
    return quantization_of(layer.config) | _bits_of(layer)


def check_one_folder(configs: Mapping[str, QLoRAConfig]) -> None:
    """Raise ValueError if layers, by name, differ in an argument that an adapter folder has once."""
    first, first_config = next(iter(configs.items()))
    for name, config in configs.items():
        for key in (*BITS, "init_lora_weights", "loftq_config", "use_dora"):
            expected = getattr(first_config, key)
            value = getattr(config, key)
            if value != expected:
                raise ValueError(
                    f"{first} has {key}={expected!r} and {name} has {key}={value!r}: an adapter folder has one value "
                    "for all layers. Use a Lightning checkpoint, merge the adapters, or convert both with the same "
                    "value."
                )


def required_base(quantization: Mapping[str, Any] | None) -> str | None:
    """A sentence on the base that adapters initialized this way need; None if the float base also fits."""
    if quantization is None:
        return None
    method = quantization.get("init_lora_weights", "default")
    if not INITIALIZATIONS[split_name(method)[0]].keeps_initial:
        return None
    bits = _in_words(quantization)
    if quantization["base_changed"]:
        return (
            f"These adapters were initialized as {method!r}, which changed the base: they fit only the 4-bit weights "
            f"({bits}) of this run, which are not those of the quantized model. Merge them, or export their difference "
            "from the initial values (base='float')."
        )
    return (
        f"These adapters were initialized as {method!r}, from the quantization error: they fit the model in 4 bits "
        f"({bits}). For a model in 16 bits export their difference from the initial values (base='float')."
    )


def trained_on(quantization: Mapping[str, Any] | None) -> str:
    """A sentence on the base that adapters were trained on, and what to do for another base."""
    if quantization is None:
        return "not recorded"
    return required_base(quantization) or (
        f"the model in 4 bits ({_in_words(quantization)}). On the model in 16 bits its outputs differ from those in "
        "training, because the weights do: merge it (lightning-qlora merge) to keep them."
    )


def check_required_base(adapter: Adapter, layers: Mapping[str, LoRALayer]) -> None:
    """Raise CheckpointMismatchError for an adapter that needs other 4-bit weights than these layers have."""
    quantization = adapter.quantization or {}
    for name, layer in layers.items():
        if quantization.get("base_changed") or layer.config.changes_base:
            if adapter.fingerprints.get(name) != layer.base_fingerprint():
                raise CheckpointMismatchError(
                    f"{adapter.source}: does not fit {name}: the initialization of these adapters, or of those in the "
                    "module, changed the 4-bit weights. Use the Lightning checkpoint, which holds these weights: merge "
                    "it, or export it with base='float' for a base in 16 bits."
                )
            continue
        bits = _bits_of(layer)
        if required_base(quantization) and any(quantization.get(key) != value for key, value in bits.items()):
            method = quantization["init_lora_weights"]
            raise CheckpointMismatchError(
                f"{adapter.source}: does not fit {name}: the adapter was initialized as {method!r} from the error of "
                f"quantization to {_in_words(quantization)}, and here it is {_in_words(bits)}. Use the same "
                "quantization, or export the checkpoint that it came from with base='float', for a base in 16 bits."
            )


def record_initialization(layer: LoRALayer, quantization: Mapping[str, Any] | None) -> None:
    """Store in a layer how its loaded adapter was initialized, for when it is saved again."""
    if quantization is None:
        quantization = {}
    method = quantization.get("init_lora_weights", "default")
    layer.config = layer.config.with_initialization(method, quantization.get("loftq_config"))


def subtract_initial(layers: Mapping[str, State], source: str) -> dict[str, State]:
    """The same adapters for the base in 16 or 32 bits: their differences from the initial values, of rank 2 r.

    With the float weight W in place of the 4-bit base, the trained layer is (up to the part of the quantization error
    that the initial values A0 and B0 did not correct)

        W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]        an adapter of rank 2 r with the same s (as PEFT's for PiSSA)

    Without initial values B must be 0. ValueError if they are not known.
    """
    differences = {}
    for name, state in layers.items():
        if MAGNITUDE in state:
            raise ValueError(
                f"{source}: with DoRA the difference from the initial values is no adapter of rank 2 r. Merge the "
                "adapter instead."
            )
        if "initial_A" not in state and state["lora_B"].any():
            raise ValueError(
                f"{source}: {name}: its initial values are not known, because an adapter folder does not hold them. "
                "Export with base='float' from the checkpoint, or the module, in which it was initialized."
            )
        device = state["lora_A"].device
        a = [state[key].to(device).float() for key in ("lora_A", "initial_A") if key in state]
        b = [state[key].to(device).float() for key in ("lora_B", "initial_B") if key in state]
        differences[name] = {
            "lora_A": torch.cat(a, dim=-2),
            "lora_B": torch.cat([b[0], *(-value for value in b[1:])], dim=-1),
        }
    return differences


def _bits_of(layer: LoRALayer) -> dict[str, Any]:
    return {
        "quant_type": layer.quant_type,
        "block_size": layer.block_size,
        "double_quant": layer.nested.numel() > 0,
    }


def _in_words(quantization: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={quantization.get(name)}" for name in BITS)
