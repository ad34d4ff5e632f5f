"""What a state dict holds of one layer: its adapter, and its frozen base or the fingerprint of that."""

from typing import Any

import torch

from lightning_qlora import starts
from lightning_qlora.adapted_linear import ADAPTER, AdaptedLinear
from lightning_qlora.packed_linear import BASE
from lightning_qlora.quantize.packed import PackedWeight

INPUT_RMS = "input_rms"  # key of what a "calibrated" start was made from
FINGERPRINT = "fingerprint"  # a frozen parameter NAME is kept in a checkpoint as NAME.fingerprint alone


class CheckpointMismatchError(RuntimeError):
    """A checkpoint belongs to another base model, or to adapters of another shape or place."""


def save(layer: AdaptedLinear, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Write the adapter, the bias, and the base: its fingerprint, or with checkpoint="full" bitsandbytes' entries."""
    for name, parameter in layer._parameters.items():
        if parameter is not None and name not in BASE:
            destination[prefix + name] = parameter if keep_vars else parameter.detach()
    if layer.input_rms is not None:
        destination[prefix + INPUT_RMS] = layer.input_rms
    # A base that depends on the last bits of an SVD can't be made again on another machine.
    if layer.config.checkpoint == "full" or starts.moves_base(layer.config):
        destination.update(layer.packed_weight.bnb_state_dict(prefix + "weight"))
    else:
        destination[f"{prefix}weight.{FINGERPRINT}"] = torch.tensor(layer.base_fingerprint())


def take_base(layer: AdaptedLinear, state_dict: dict[str, Any], prefix: str) -> set[str]:
    """Check the base against a fingerprint, or take it from a dense or a packed weight, before the adapter is loaded.

    Args:
        layer: The layer that loads.
        state_dict: What it loads; the entries of the base are taken out.
        prefix: The layer's name in it, with a dot at the end.

    Returns:
        Names of the layer's parameters that the rest need not hold.

    Raises:
        CheckpointMismatchError: If the state is one of another base, or of an adapter of another rank.
    """
    name = prefix.removesuffix(".") or "the layer itself"
    expected = state_dict.pop(f"{prefix}weight.{FINGERPRINT}", None)
    if expected is not None and int(expected) != layer.base_fingerprint():
        raise CheckpointMismatchError(
            f"{name}: the checkpoint was trained on another base weight (fingerprint {int(expected):x} there, "
            f"{layer.base_fingerprint():x} here). Load the base model and the quantization arguments it was "
            "trained with."
        )
    lora_a = state_dict.get(prefix + "lora_A")
    if lora_a is not None:
        if lora_a.shape != layer.lora_A.shape:
            raise CheckpointMismatchError(
                f"{name}: the checkpoint's adapter has rank {lora_a.shape[0]} for {lora_a.shape[1]} inputs, this "
                f"layer's has rank {layer.r} for {layer.in_features}. Set r (or rank_pattern) so that it has "
                f"rank {lora_a.shape[0]}."
            )
        layer.input_rms = state_dict.pop(prefix + INPUT_RMS, None)  # what it started from, or nothing
    with_adapter = any(prefix + key in state_dict for key in ADAPTER)
    if _take_weight(layer, state_dict, prefix, with_adapter) and not with_adapter:
        return {*BASE, *ADAPTER}  # a checkpoint of the dense module: the adapter keeps its start
    return {*BASE}


def _take_weight(layer: AdaptedLinear, state_dict: dict[str, Any], prefix: str, with_adapter: bool) -> bool:
    weight = state_dict.get(prefix + "weight")
    if weight is None:
        return False
    if weight.is_floating_point() and f"{prefix}weight.absmax" not in state_dict:
        if tuple(layer._as_rows(weight).shape) != layer._shape:
            raise CheckpointMismatchError(
                f"{prefix}weight: has shape {list(weight.shape)} in the checkpoint, {list(layer.weight.shape)} here."
            )
        depends = layer.config.use_dora or layer.config.start in ("loftq", "pissa") or layer.dense_weight is not None
        if depends and not with_adapter:
            layer.start(weight, layer.packed.device)
        else:
            layer.quantize_weight(weight.to(layer.packed.device))
    else:
        loaded = PackedWeight.from_bnb_state_dict(state_dict, prefix + "weight")
        layer.set_packed_weight(loaded.to(layer.packed.device))
    for key in [key for key in state_dict if key == prefix + "weight" or key.startswith(prefix + "weight.")]:
        del state_dict[key]
    return True
