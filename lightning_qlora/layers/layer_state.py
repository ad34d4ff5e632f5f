"""What a layer takes from a state dict: its adapter, and a base if the state dict holds one."""

from typing import Any

import torch

from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.lora_layer import ADAPTER, INITIAL, LoRALayer
from lightning_qlora.layers.packed_linear import BASE
from lightning_qlora.quantization.packed_weight import PackedWeight

LOAD_THE_BASE = (
    "Load the base model of the training, with its quantization arguments, and do not change it afterwards. If the "
    "module initializes it at random, set the same seed before it is built; a checkpoint that is saved with "
    "checkpoint='full' holds the base."
)


class CheckpointMismatchError(RuntimeError):
    """A checkpoint or adapter belongs to another base model, or to layers of another shape or name."""


def load_base(layer: LoRALayer, state_dict: dict[str, Any], prefix: str) -> set[str]:
    """Replace the base by the dense or 4-bit weight in a state, if it has one; check the adapter, which loads later.

    The entries of the base are removed from the state. Its values may be loaded lazily (Lightning's `_lazy_load`);
    `contiguous()` loads them.

    Returns:
        Names of the layer's parameters that the state may lack.

    Raises:
        CheckpointMismatchError: If the weight has another shape, or the adapter another rank.
        ValueError: If the adapter holds NaN or Inf.
    """
    lora_a = state_dict.get(prefix + "lora_A")
    if lora_a is not None:
        for key in (prefix + key for key in (*ADAPTER, *INITIAL) if prefix + key in state_dict):
            value = state_dict[key].contiguous()
            if not is_sharded(value) and not torch.isfinite(value).all():
                raise ValueError(
                    f"{key}: holds NaN or Inf: the training diverged, or the file is damaged. Use an earlier "
                    "checkpoint."
                )
        if lora_a.shape != layer.lora_A.shape:
            name = prefix.removesuffix(".") or "the layer itself"
            raise CheckpointMismatchError(
                f"{name}: the checkpoint's adapter has rank {lora_a.shape[0]} for {lora_a.shape[1]} inputs, this "
                f"layer's has rank {layer.r} for {layer.in_features}. Set r (or rank_pattern) so that it has "
                f"rank {lora_a.shape[0]}."
            )
        for key in INITIAL:
            value = state_dict.pop(prefix + key, None)
            setattr(layer, key, None if value is None else value.contiguous())
    with_adapter = any(prefix + key in state_dict for key in ADAPTER)
    if _load_weight(layer, state_dict, prefix, with_adapter) and not with_adapter:
        return {*BASE, *ADAPTER}  # a checkpoint of the dense module: the adapter keeps its values
    return {*BASE}


def _load_weight(layer: LoRALayer, state_dict: dict[str, Any], prefix: str, with_adapter: bool) -> bool:
    """Replace the base by the dense or 4-bit weight in a state, and remove that; False if there is none."""
    key = prefix + "weight"
    if key not in state_dict:
        return False
    names = [name for name in state_dict if name == key or name.startswith(key + ".")]
    entries = {name: state_dict.pop(name).contiguous() for name in names}
    weight = entries[key]
    packed = None
    if not weight.is_floating_point() or f"{key}.absmax" in entries:
        packed = PackedWeight.from_bnb_state_dict(entries, key)
    shape = tuple(layer._as_stored(weight).shape) if packed is None else packed.shape
    if shape != layer._shape:
        raise CheckpointMismatchError(
            f"{key}: has shape {list(shape)} in the checkpoint, {list(layer._shape)} here. Build the model of the "
            "training."
        )
    # A "calibrated" adapter depends on the weight only until the inputs were measured.
    from_weight = layer.config.initializes_from_weight and layer.config.initialization != "calibrated"
    if packed is not None:
        layer.set_packed_weight(packed.to(layer.packed.device))
    elif not with_adapter and (layer.config.use_dora or from_weight or layer.dense_weight is not None):
        layer.initialize(weight, layer.packed.device)
    else:
        layer.quantize_weight(weight)
    return True
