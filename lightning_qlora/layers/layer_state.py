"""The entries of a layer in a state dict, and what it takes from one: its adapter, and a base if there is one."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.checks import DAMAGED, DIVERGED, check_finite, shown
from lightning_qlora.config import arguments_that
from lightning_qlora.files.lightning_checkpoint import check_dense
from lightning_qlora.files.safetensors_folder import parse_json
from lightning_qlora.layers.lora_layer import ADAPTER, INITIAL, LoRALayer
from lightning_qlora.layers.packed_layer import ADAPTER_ARGUMENTS, BASE, in_rows
from lightning_qlora.quantization.bnb_entries import (
    AVERAGED,
    bnb_keys,
    bnb_meta,
    json_bytes,
    read_bnb_meta,
)
from lightning_qlora.quantization.packed_weight import PackedBytes, PackedWeight, check_bytes
from lightning_qlora.starts.starts import STARTS, corrects_error
from lightning_qlora.tensors.dtensor import gather, is_sharded, local
from lightning_qlora.tensors.values import has_values

SAME_FUNCTION = arguments_that("of_function")

LOAD_THE_BASE = (
    "Load the base model of the training, with its quantization arguments, and do not change it afterwards. If the "
    "module initializes it at random, set the same seed before it is built; a checkpoint that is saved with "
    "checkpoint='full' holds the base."
)


BIAS_ALONE = (
    "load_state_dict gets biases of 4-bit layers and not their weights, so these layers have the biases of one model "
    "and the weights of another. Code that keeps those keys of a state dict which the module has with equal shapes "
    "leaves out the weights, because a converted module has no dense weight. Pass the whole state dict."
)

ADAPTER_STAYS = (
    "load_state_dict gets weights of the dense module, and the adapters of the 4-bit layers, which have been trained, "
    "keep their values: the module computes something else than the dense one. To begin anew, as for the next fold of "
    "a cross-validation, build the module again, or load a state dict that was made after its conversion."
)


class CheckpointMismatchError(RuntimeError):
    """A checkpoint or adapter belongs to another base model, or to layers of another shape or name.

    A `RuntimeError`; its message names the layer and the key.

    Example:
        ```python
        from lightning_qlora import CheckpointMismatchError, convert, load_adapter, save_adapter
        from torch import nn

        model, other = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(32, 32))
        convert(model, r=4)
        convert(other, r=4)
        save_adapter(model, "adapter")
        try:
            load_adapter(other, "adapter")
        except CheckpointMismatchError as error:
            print(error)
        ```
    """


class SavedLayer(LoRALayer):
    """A LoRALayer with its entries in state dicts: all of it, in each layer by itself."""

    base_left_out_at: tuple[str, ...] = ()  # prefixes at which a state dict that is being made leaves its base out

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The adapter, its initial values if B was not 0, and the base. Nothing is gathered."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix + "lora_A" not in destination:  # PyTorch Geometric's Linear writes its weight and bias alone
            nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        for name in ("weight", *BASE):
            destination.pop(prefix + name, None)  # where they are parameters, or the layer's class writes them
        if prefix not in self.base_left_out_at:
            destination |= base_entries(self, prefix)
        if self.initial is not None:
            destination.update(zip((prefix + name for name in INITIAL), self.initial, strict=True))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        errors: list[str],
    ) -> None:
        """The base, then the adapter. `module_state.py` removes what has a fingerprint from the missing keys."""
        initial = self.initial
        has_adapter = prefix + "lora_A" in state_dict
        if has_adapter:
            _check_adapter(self, state_dict, prefix)
            values = [state_dict.pop(prefix + key).contiguous() for key in INITIAL if prefix + key in state_dict]
            self.set_initial(values if len(values) == len(INITIAL) else None)
        is_base_in_state = has_base(state_dict, prefix)
        if is_base_in_state:
            _load_base(self, state_dict, prefix, metadata.get("assign_to_params_buffers", False))
        optional = {*BASE}
        if not any(prefix + key in state_dict for key in ADAPTER):
            if is_base_in_state:
                optional |= {*ADAPTER}  # a checkpoint of the dense module: the adapter keeps its values
                if has_values(self.lora_B) and local(self.lora_B).any():
                    warnings.warn(ADAPTER_STAYS, stacklevel=2)
            elif prefix + "bias" in state_dict:
                warnings.warn(BIAS_ALONE, stacklevel=2)
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected_keys, errors)
        if not is_base_in_state:
            missing.append(prefix + "weight")
        missing_keys += [key for key in missing if key.removeprefix(prefix) not in optional]
        if has_adapter:
            self._begin_as_saved(initial)

    def _begin_as_saved(self, initial: tuple[Tensor, Tensor] | None) -> None:
        """Wait for inputs if the loaded adapter was saved before it was initialized from them, else no longer.

        `initial`: what this layer was initialized with, if it was, and begins with again.
        """
        begin_again = STARTS[self.config.init_lora_weights].begin_again
        if begin_again is None or self.initial is not None or gather(self.lora_B).any():
            self.stop_observing()
        else:
            begin_again(self, initial)


def base_entries(layer: LoRALayer, prefix: str) -> dict[str, Tensor]:
    """The 4-bit weight of a layer in a state dict, with the arguments that its adapter needs.

    bitsandbytes' entries. Of a stack, for which it has none, and of a sharded layer, from whose shard not all of them
    can be computed: the three tensors by their names, and bitsandbytes' description of the weight.
    """
    key = f"{prefix}weight"
    entries = {prefix + ADAPTER_ARGUMENTS: json_bytes({name: getattr(layer.config, name) for name in SAME_FUNCTION})}
    if len(layer._shape) == 2 and not is_sharded(layer.packed):
        return entries | PackedWeight.from_bytes(layer.weight_bytes, layer.dtype_before).bnb_state_dict(key)
    entries |= {prefix + name: getattr(layer, name).detach() for name in BASE}
    return entries | bnb_meta(key, layer._shape, layer.quant_type, layer.block_size, layer.dtype_before, {})


def pop_base(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Remove the base of a layer, dense or in 4 bits, from a state dict; returns its entries."""
    return {key: state_dict.pop(key) for key in _base_keys(prefix) if key in state_dict}


def _base_keys(prefix: str) -> list[str]:
    return [*(prefix + name for name in (ADAPTER_ARGUMENTS, *BASE)), *bnb_keys(f"{prefix}weight")]


def check_tensors_of_layer(state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError if an entry of a layer in a state dict is no tensor that stores each of its values."""
    for key in (*_base_keys(prefix), *(prefix + name for name in (*ADAPTER, *INITIAL))):
        if key in state_dict:
            check_dense(key, state_dict[key])


def has_base(state_dict: Mapping[str, Any], prefix: str) -> bool:
    return prefix + "weight" in state_dict or prefix + BASE[0] in state_dict


def read_base(state_dict: Mapping[str, Any], prefix: str) -> list[PackedWeight]:
    """The 4-bit weights of a layer in a state dict; none if it has none."""
    found = _read_bytes(state_dict, prefix)
    if found is None:
        return []
    weight, dtype = found
    return [PackedWeight.from_bytes(matrix, dtype) for matrix in weight.unbind()]


def _read_bytes(state_dict: Mapping[str, Any], prefix: str) -> tuple[PackedBytes, torch.dtype] | None:
    """The 4-bit weight or weights that `base_entries` wrote, and the type that they decode to."""
    key = f"{prefix}weight"
    if f"{key}.absmax" in state_dict:
        weight = PackedWeight.from_bnb_state_dict(state_dict, key)
        return in_rows(weight.to_bytes()), weight.dtype
    if prefix + BASE[0] not in state_dict:
        return None
    meta = read_bnb_meta(state_dict, key)
    if meta is None or any(prefix + name not in state_dict for name in BASE):
        raise ValueError(f"{prefix}{BASE[0]}: its description or another of its tensors is missing. {DAMAGED}")
    packed, absmax, nested = (state_dict[prefix + name].contiguous() for name in BASE)
    stored = PackedBytes(packed, absmax, nested, tuple(meta["shape"]), meta["quant_type"], meta["blocksize"])
    check_bytes(stored)
    return stored, getattr(torch, meta["dtype"])


def check_same_arguments(layer: LoRALayer, saved: Mapping[str, Any]) -> None:
    for argument in SAME_FUNCTION:
        value = getattr(layer.config, argument)
        if argument in saved and saved[argument] != value:
            raise CheckpointMismatchError(
                f"{layer.full_name or 'the layer itself'}: {argument} is {shown(saved[argument])} in the checkpoint "
                f"and {value!r} here: the adapters would compute something else than in training. Set it (lora_alpha "
                "also by alpha_pattern) to the value of the checkpoint."
            )


def _check_adapter(layer: LoRALayer, state_dict: Mapping[str, Any], prefix: str) -> None:
    """CheckpointMismatchError if the adapter in a state has another rank, ValueError if it holds NaN or Inf.

    Values of other shapes, which may be expanded to any size, are not read: torch refuses them.
    """
    lora_a = state_dict[prefix + "lora_A"]
    if lora_a.shape != layer.lora_A.shape:
        raise CheckpointMismatchError(
            f"{layer.full_name or 'the layer itself'}: the checkpoint's adapter has rank {lora_a.shape[-2]} for "
            f"{lora_a.shape[-1]} inputs, this layer's has rank {layer.r} for {layer.in_features}. Set r (or "
            f"rank_pattern) so that it has rank {lora_a.shape[-2]}."
        )
    own = {name: layer._parameters.get(name) for name in ADAPTER}
    shapes = {name: parameter.shape for name, parameter in own.items() if parameter is not None}
    shapes |= dict(zip(INITIAL, (layer.lora_A.shape, layer.lora_B.shape), strict=True))
    for name, shape in shapes.items():
        value = state_dict.get(prefix + name)
        if value is None:
            continue
        if value.shape == shape:
            value = value.contiguous()
            if value.numel() and not is_sharded(value):
                check_finite(f"{prefix}{name}:", value, DIVERGED)
        elif name in INITIAL:
            raise ValueError(f"{prefix}{name}: has shape {list(value.shape)}, and must have {list(shape)}. {DAMAGED}")


def _load_base(layer: LoRALayer, state_dict: dict[str, Any], prefix: str, assign: bool) -> None:
    """Replace the base by the dense or 4-bit weight in a state, and remove that.

    Its values may be loaded lazily (Lightning's `_lazy_load`); `contiguous()` loads them. They are copied, except with
    `assign`, the argument of `load_state_dict`.
    """
    key = prefix + "weight"
    with_adapter = any(prefix + key in state_dict for key in ADAPTER)
    entries = {name: value.contiguous() for name, value in pop_base(state_dict, prefix).items()}
    arguments = entries.pop(prefix + ADAPTER_ARGUMENTS, None)
    if with_adapter and arguments is not None:
        try:
            saved = parse_json(bytes(arguments.byte().tolist()), prefix + ADAPTER_ARGUMENTS)
        except ValueError as error:
            raise ValueError(f"{error} {AVERAGED}") from error
        check_same_arguments(layer, saved)
    found = _read_bytes(entries, prefix)
    if found is None:
        shape = entries[key].shape
        expected = layer.weight_shape
    else:
        shape = found[0].shape
        expected = layer._shape
    if tuple(shape) != expected:
        raise CheckpointMismatchError(
            f"{layer.full_name or 'the layer itself'}: its weight has shape {list(shape)} in the checkpoint, "
            f"{list(expected)} here. Build the model of the training."
        )
    device = layer.packed.device
    if layer.packed.is_meta:  # load_state_dict(..., assign=True): the values of the state take the place of none
        device = next(iter(entries.values())).device
    layer.remember_base()
    if found is not None:
        weight, dtype = found
        layer.set_bytes(weight.to(device, copy=not assign), dtype)
    elif with_adapter or not (layer.matrix_class.reads_weight or layer.input_observer is not None):
        layer.quantize_weight(entries[key], device)
    else:
        dense = entries[key]
        if corrects_error(layer.config) and not assign:
            dense = dense.clone()  # it is kept until then
        layer.initialize(dense, device)
