"""What a layer takes from a state dict: its adapter, and a base if the state dict holds one."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.layers.dtensor import gather, is_sharded
from lightning_qlora.layers.lora_layer import ADAPTER, INITIAL, LoRALayer
from lightning_qlora.layers.names import parameter_name
from lightning_qlora.layers.packed_linear import BASE
from lightning_qlora.quantization.packed_weight import PackedWeight

LOAD_THE_BASE = (
    "Load the base model of the training, with its quantization arguments, and do not change it afterwards. If the "
    "module initializes it at random, set the same seed before it is built; a checkpoint that is saved with "
    "checkpoint='full' holds the base."
)


class CheckpointMismatchError(RuntimeError):
    """A checkpoint or adapter belongs to another base model, or to layers of another shape or name."""


class SavedLayer(LoRALayer):
    """A LoRALayer with its entries in state dicts."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Without the base, which the hook of the converted module writes, or a fingerprint of it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in BASE:
            destination.pop(prefix + name, None)  # it is there if a strategy splits the weight
        if self.initial is not None:
            destination.update({prefix + name: getattr(self, name) for name in INITIAL})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        metadata, strict, missing_keys, *others = arguments
        has_adapter = prefix + "lora_A" in state_dict
        initial = self.initial
        optional = load_base(self, state_dict, prefix)
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *others)
        missing_keys += [key for key in missing if key.removeprefix(prefix) not in optional]
        if has_adapter:
            self._begin_as_saved(initial)

    def _begin_as_saved(self, initial: tuple[Tensor, Tensor] | None) -> None:
        """Wait for inputs if the loaded adapter was saved before it was initialized from them, else no longer.

        `initial`: what this layer was initialized with, if it was, and begins with again.
        """
        needs_data = self.config.init_kind.needs_data
        if not needs_data or self.initial is not None or gather(self.lora_B).any():
            self.stop_waiting()
        elif initial is not None:
            self.set_adapter(*initial)
            self.set_initial(*initial)
        elif self.input_statistics is None:
            warnings.warn(
                f"{self.full_name}: the loaded state dict was saved before the calibration of the adapter "
                "(init_lora_weights='calibrated'), and its float weight is freed, so it has the default initialization "
                "now. Load it into a newly built module instead.",
                stacklevel=2,
            )


def base_entries(layer: LoRALayer, key: str) -> dict[str, Tensor]:
    """The 4-bit base in a state dict of checkpoint="full": bitsandbytes' entries, of a stack `key.i` for expert i."""
    entries: dict[str, Tensor] = {}
    for number, weight in enumerate(layer.packed_weights):
        name = key
        if layer.is_stack:
            name = f"{key}.{number}"
        entries |= weight.bnb_state_dict(name)
    return entries


def has_base(state_dict: Mapping[str, Any], key: str) -> bool:
    """Whether a state dict has the base of a layer, dense or in 4 bits."""
    return key in state_dict or f"{key}.0" in state_dict


def read_base(state_dict: Mapping[str, Any], key: str) -> list[PackedWeight]:
    """The 4-bit weights in such entries; none if there are none."""
    if f"{key}.absmax" in state_dict:
        return [PackedWeight.from_bnb_state_dict(state_dict, key)]
    weights: list[PackedWeight] = []
    while f"{key}.{len(weights)}" in state_dict:
        weights.append(PackedWeight.from_bnb_state_dict(state_dict, f"{key}.{len(weights)}"))
    return weights


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
                f"{name}: the checkpoint's adapter has rank {lora_a.shape[-2]} for {lora_a.shape[-1]} inputs, this "
                f"layer's has rank {layer.r} for {layer.in_features}. Set r (or rank_pattern) so that it has "
                f"rank {lora_a.shape[-2]}."
            )
        initial = [state_dict.pop(prefix + key, None) for key in INITIAL]
        layer.set_initial(*(None if value is None else value.contiguous() for value in initial))
    with_adapter = any(prefix + key in state_dict for key in ADAPTER)
    if _load_weight(layer, state_dict, prefix, with_adapter) and not with_adapter:
        return {*BASE, *ADAPTER}  # a checkpoint of the dense module: the adapter keeps its values
    return {*BASE}


def _load_weight(layer: LoRALayer, state_dict: dict[str, Any], prefix: str, with_adapter: bool) -> bool:
    """Replace the base by the dense or 4-bit weight in a state, and remove that; False if there is none."""
    key = prefix + "weight"
    if not has_base(state_dict, key):
        return False
    names = [name for name in state_dict if name == key or name.startswith(key + ".")]
    entries = {name: state_dict.pop(name).contiguous() for name in names}
    packed = read_base(entries, key)
    if packed:
        shape = packed[0].shape
        expected = layer._shape[-2:]
    else:
        shape = entries[names[0]].shape
        expected = layer.weight_shape
    if tuple(shape) != expected:
        name = key
        if layer.is_stack:
            name = parameter_name(prefix.removesuffix("."))
        raise CheckpointMismatchError(
            f"{name}: has shape {list(shape)} in the checkpoint, {list(expected)} here. Build the model of the "
            "training."
        )
    device = layer.packed.device
    if layer.packed.is_meta:  # load_state_dict(..., assign=True): the values of the state take the place of none
        device = next(iter(entries.values())).device
    # An adapter that is initialized from data depends on the weight only until the inputs were measured.
    from_weight = layer.config.init_kind.keeps_initial and not layer.config.init_kind.needs_data
    if packed:
        layer.set_packed_weights([weight.to(device) for weight in packed])
    elif not with_adapter and (layer.config.use_dora or from_weight or layer.input_statistics is not None):
        layer.initialize(entries[key], device)
    else:
        layer.quantize_weight(entries[key], device)
    return True
