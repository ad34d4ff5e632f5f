"""The adapters in a Lightning checkpoint, read without the module."""

import os

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import MAGNITUDE, Adapter
from lightning_qlora.adapters.base_model import OF_ADAPTER, adapter_on_base, config_of_layer
from lightning_qlora.adapters.module_state import CONFIG_KEY, read_conversion
from lightning_qlora.files.lightning_checkpoint import read_checkpoint
from lightning_qlora.layers.fingerprint import checksum, fingerprint_of_entry
from lightning_qlora.layers.layer_state import FINGERPRINT, INPUT_RMS
from lightning_qlora.layers.names import last_part, named, owner_name, plain_name
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
    outer = plain_name(root)
    if description["prefix"]:
        outer += f"{description['prefix']}."
    keys = sorted(key[: -len(".lora_A")] for key in state if key.endswith(".lora_A") or key == "lora_A")
    if not keys:
        raise ValueError(f"{path}: no adapter.")
    configs = {}
    tensors = {}
    input_rms = {}
    fingerprints = {}
    bases = {}
    for key in keys:
        name = plain_name(key).removeprefix(outer)  # in the base model
        configs[name] = config_of_layer(description, name, config)
        tensors[name] = (state[f"{key}.lora_A"], state[f"{key}.lora_B"], state.get(f"{key}.{MAGNITUDE}"))
        if f"{key}.{INPUT_RMS}" in state:
            input_rms[name] = state[f"{key}.{INPUT_RMS}"]
        if f"{key}.weight.{FINGERPRINT}" in state:
            fingerprints[name] = fingerprint_of_entry(state[f"{key}.weight.{FINGERPRINT}"])
        if f"{key}.weight.absmax" in state:
            bases[name] = PackedWeight.from_bnb_state_dict(state, f"{key}.weight")
    owners = {outer + owner for owner in description["trained_in_full"]}
    saved = {
        plain_name(key).removeprefix(outer): value
        for key, value in state.items()
        if owner_name(plain_name(key)) in owners and not key.endswith("." + FINGERPRINT)
    }
    return adapter_on_base(
        description,
        configs,
        tensors,
        input_rms,
        fingerprints.get,
        saved=saved,
        bases=bases,
        source=str(path),
    )


def fingerprint_of_base(state: dict[str, Tensor]) -> str | None:
    """One number for all fingerprints in a state dict, in hexadecimal; None if it has none."""
    keys = sorted(key for key in state if key.endswith("." + FINGERPRINT))
    if not keys:
        return None
    return checksum(torch.tensor([fingerprint_of_entry(state[key]) for key in keys], device="cpu"))


def read_converted_state_dict(path: str | os.PathLike[str], weights_only: bool = True) -> tuple[dict[str, Tensor], str]:
    """The state dict of the converted module in a checkpoint, and the prefix of that module's keys in it.

    Raises as `read_adapter_from_checkpoint`.
    """
    checkpoint = read_checkpoint(path, weights_only)
    if isinstance(checkpoint, dict):
        # Fabric saves the module under a name that the user chooses.
        for state in (checkpoint, *(value for value in checkpoint.values() if isinstance(value, dict))):
            for key in state:
                if last_part(str(key)) == CONFIG_KEY:
                    return state, key[: -len(CONFIG_KEY)]
    raise ValueError(f"{path}: holds no {CONFIG_KEY!r}: it was not saved from a converted module.")
