"""The adapters in a Lightning checkpoint, read without the module."""

import os

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import MAGNITUDE, Adapter, ExpertStack, LayerAdapter
from lightning_qlora.adapters.base_compatibility import alpha_in_folder, check_one_folder
from lightning_qlora.adapters.base_model import config_of_layer, seed_name_of
from lightning_qlora.adapters.checksums import check_checksums
from lightning_qlora.adapters.module_state import CONFIG_KEY, base_model_of, config_of
from lightning_qlora.files.lightning_checkpoint import read_checkpoint
from lightning_qlora.layers.dotted_names import last_part, plain_name
from lightning_qlora.layers.fingerprint import checksum
from lightning_qlora.layers.initialization.difference import InitializationRecord
from lightning_qlora.layers.layer_state import FINGERPRINT, INPUT_RMS
from lightning_qlora.quantization.packed_weight import PackedWeight


def read_adapter_from_checkpoint(path: str | os.PathLike[str], weights_only: bool = True) -> Adapter:
    """The adapters that `get_adapter` would return for the module that was saved.

    The checkpoint is of the Trainer, ModelCheckpoint or Fabric, in one file or in shards. `weights_only` refuses
    objects other than tensors and plain values, as in `torch.load`.

    Raises:
        FileNotFoundError, ValueError: If there is no such file, or it was not saved from a converted module.
    """
    state, root = read_converted_state_dict(path, weights_only)
    try:
        config, about = config_of(state, root), base_model_of(state, root)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if config is None or "prefix" not in about:
        raise ValueError(f"{path}: its {CONFIG_KEY!r} does not name the base model. Use another copy of it.")
    outer = plain_name(root) + (f"{about['prefix']}." if about["prefix"] else "")
    names = sorted(key[: -len(".lora_A")] for key in state if key.endswith(".lora_A") or key == "lora_A")
    if not names:
        raise ValueError(f"{path}: no adapter.")
    keys = {plain_name(name).removeprefix(outer): name for name in names}  # name in the base model -> name in the state
    owners = {outer + owner for owner in about["trained_in_full"]}
    configs = {name: config_of_layer(about, name, config) for name in keys}
    check_one_folder(configs)
    use_rslora = all(of_layer.use_rslora for of_layer in configs.values())
    quantization = about["quantization"]  # adapters from a folder may have another initialization than `config`
    fingerprints = {name: state.get(f"{key}.weight.{FINGERPRINT}") for name, key in keys.items()}
    return Adapter(
        layers={
            name: LayerAdapter(
                state[f"{key}.lora_A"],
                state[f"{key}.lora_B"],
                alpha_in_folder(configs[name], use_rslora),
                state.get(f"{key}.{MAGNITUDE}"),
            )
            for name, key in keys.items()
        },
        experts={name: ExpertStack(*stack) for name, stack in about.get("experts", {}).items()},
        saved={
            plain_name(key).removeprefix(outer): value
            for key, value in state.items()
            if plain_name(key).rpartition(".")[0] in owners and not key.endswith("." + FINGERPRINT)
        },
        modules_to_save=sorted(about["trained_in_full"]),
        target_modules=about["target_modules"],
        use_rslora=use_rslora,
        fan_in_fan_out=about["fan_in_fan_out"],
        lora_dropout=config.lora_dropout,
        task_type=about["task_type"],
        base_model=about["base_model"],
        quantization=quantization,
        bases={
            name: PackedWeight.from_bnb_state_dict(state, f"{key}.weight")
            for name, key in keys.items()
            if f"{key}.weight.absmax" in state
        },
        origin=InitializationRecord(
            configs[next(iter(configs))].with_initialization(
                quantization["init_lora_weights"], quantization.get("loftq_config")
            ),
            {name: seed_name_of(about, name) for name in keys},
            {name: rms for name, key in keys.items() if (rms := state.get(f"{key}.{INPUT_RMS}")) is not None},
            {name: int(value) for name, value in fingerprints.items() if value is not None}.get,
        ),
        source=str(path),
    )


def fingerprint_of_base(state: dict[str, Tensor]) -> str | None:
    """One number for all fingerprints in a state dict, in hexadecimal; None if it has none."""
    prints = [int(value) for key, value in sorted(state.items()) if key.endswith("." + FINGERPRINT)]
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
                    root = key[: -len(CONFIG_KEY)]
                    check_checksums(state, root, str(path))
                    return state, root
    raise ValueError(f"{path}: holds no {CONFIG_KEY!r}: it was not saved from a converted module.")
