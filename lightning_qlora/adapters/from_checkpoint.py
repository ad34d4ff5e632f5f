"""The adapters in a Lightning checkpoint, read without the module."""

import os

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import MAGNITUDE, Adapter
from lightning_qlora.adapters.base_model import OF_ADAPTER, adapter_on_base, config_of_layer
from lightning_qlora.adapters.module_state import CONFIG_KEY, read_conversion
from lightning_qlora.files.lightning_checkpoint import read_checkpoint
from lightning_qlora.layers.dotted_names import last_part, plain_name
from lightning_qlora.layers.fingerprint import checksum, fingerprint_of_entry
from lightning_qlora.layers.layer_state import FINGERPRINT, INPUT_RMS
from lightning_qlora.layers.names import named
from lightning_qlora.quantization.packed_weight import PackedWeight


def read_adapter_from_checkpoint(path: str | os.PathLike[str], weights_only: bool = True) -> Adapter:
    """The adapters that `get_adapter` would return for the module that was saved.

    The checkpoint is of the Trainer, ModelCheckpoint or Fabric, in one file or in shards. `weights_only` refuses
    objects other than tensors and plain values, as in `torch.load`. FileNotFoundError or ValueError if there is no such
    file, or it was not saved from a converted module.
    """
    state, root = read_converted_state_dict(path, weights_only)
    with named(path):
        config, description = read_conversion(state, root)
    if config is None or not description.keys() >= {"prefix", "trained_in_full", *OF_ADAPTER}:
        raise ValueError(f"{path}: its {CONFIG_KEY!r} does not name the base model. Use another copy of it.")
    outer = plain_name(root) + (f"{description['prefix']}." if description["prefix"] else "")
    names = sorted(key[: -len(".lora_A")] for key in state if key.endswith(".lora_A") or key == "lora_A")
    if not names:
        raise ValueError(f"{path}: no adapter.")
    keys = {plain_name(name).removeprefix(outer): name for name in names}  # name in the base model -> name in the state
    owners = {outer + owner for owner in description["trained_in_full"]}
    configs = {name: config_of_layer(description, name, config) for name in keys}
    fingerprints = {name: state.get(f"{key}.weight.{FINGERPRINT}") for name, key in keys.items()}
    return adapter_on_base(
        description,
        configs,
        {name: (state[f"{k}.lora_A"], state[f"{k}.lora_B"], state.get(f"{k}.{MAGNITUDE}")) for name, k in keys.items()},
        {name: rms for name, key in keys.items() if (rms := state.get(f"{key}.{INPUT_RMS}")) is not None},
        {name: fingerprint_of_entry(value) for name, value in fingerprints.items() if value is not None}.get,
        saved={
            plain_name(key).removeprefix(outer): value
            for key, value in state.items()
            if plain_name(key).rpartition(".")[0] in owners and not key.endswith("." + FINGERPRINT)
        },
        bases={
            name: PackedWeight.from_bnb_state_dict(state, f"{key}.weight")
            for name, key in keys.items()
            if f"{key}.weight.absmax" in state
        },
        source=str(path),
    )


def fingerprint_of_base(state: dict[str, Tensor]) -> str | None:
    """One number for all fingerprints in a state dict, in hexadecimal; None if it has none."""
    prints = [fingerprint_of_entry(value) for key, value in sorted(state.items()) if key.endswith("." + FINGERPRINT)]
    return checksum(torch.tensor(prints, device="cpu")) if prints else None


def read_converted_state_dict(path: str | os.PathLike[str], weights_only: bool = True) -> tuple[dict[str, Tensor], str]:
    """The state dict of the converted module in a checkpoint, and the prefix of that module's keys in it.

    Raises as `read_adapter_from_checkpoint`.
    """
    checkpoint = read_checkpoint(path, weights_only)
    if isinstance(checkpoint, dict):
        # Fabric saves the module under a name that the user chooses.
        for state in (checkpoint, *(v for v in checkpoint.values() if isinstance(v, dict))):
            for key in state:
                if last_part(str(key)) == CONFIG_KEY:
                    return state, key[: -len(CONFIG_KEY)]
    raise ValueError(f"{path}: holds no {CONFIG_KEY!r}: it was not saved from a converted module.")
