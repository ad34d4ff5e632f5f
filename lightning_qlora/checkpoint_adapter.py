"""The adapter in a Lightning checkpoint, without the module it was saved from."""

import os

from torch import Tensor

from lightning_qlora.adapters.base_model import plain_name
from lightning_qlora.adapters.folder import MAGNITUDE, Adapter, LayerAdapter
from lightning_qlora.checkpoint_file import read_checkpoint
from lightning_qlora.linear_state import FINGERPRINT, INPUT_RMS
from lightning_qlora.quantize.packed import PackedWeight
from lightning_qlora.starts.since_start import Origin, quantization_of
from lightning_qlora.state import CONFIG, base_model_of, config_of


def adapter_of_checkpoint(
    path: str | os.PathLike[str], prefix: str | None = None, weights_only: bool = True
) -> Adapter:
    """What `adapter_of` says of the module that a checkpoint was saved from.

    Args:
        path: A checkpoint of the Trainer, ModelCheckpoint or Fabric, in one file or in shards.
        prefix: Name of the base model in the module that was saved ("model", say); None: what the checkpoint says.
        weights_only: As in `torch.load`: whether to refuse what is neither a tensor nor a plain value.

    Raises:
        FileNotFoundError, ValueError: If there is no such file, or it was not saved from a converted module.
    """
    state, root = read_state(path, weights_only)
    config, about = config_of(state, root), base_model_of(state)
    assert config is not None  # read_state found it
    inner = about["prefix"] if prefix is None else plain_name(prefix.strip("."))
    outer = plain_name(root) + (f"{inner}." if inner else "")
    names = sorted(key[: -len(".lora_A")] for key in state if key.endswith(".lora_A") or key == "lora_A")
    outside = [name for name in names if not plain_name(name).startswith(outer)]
    if outside or not names:
        raise ValueError(f"{path}: {outside[0]!r} does not begin with {outer!r}." if names else f"{path}: no adapter.")
    keys = {plain_name(name).removeprefix(outer): name for name in names}  # without what torch.compile put into them
    layers = {
        name: LayerAdapter(
            state[f"{key}.lora_A"], state[f"{key}.lora_B"], config.alpha_of(key), state.get(f"{key}.{MAGNITUDE}")
        )
        for name, key in keys.items()
    }
    # What the arguments say, or where the folder that adapters came from says that they started.
    quantization = about.get("quantization") or quantization_of(config)
    owners = {outer + owner for owner in about["trained_in_full"]}
    saved = {
        plain_name(key).removeprefix(outer): value
        for key, value in state.items()
        if plain_name(key).rpartition(".")[0] in owners and not key.endswith("." + FINGERPRINT)
    }
    return Adapter(
        layers=layers,
        saved=saved,
        modules_to_save=sorted(about["trained_in_full"]),
        # Older checkpoints don't say it: the end of a name may be that of a layer without an adapter too.
        targets=(about.get("target_modules") if inner == about["prefix"] else None) or sorted(layers),
        use_rslora=config.use_rslora,
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
        origin=Origin(
            config.with_start(quantization["init_lora_weights"], quantization.get("loftq_config")),
            {name: key.removeprefix(root) for name, key in keys.items()},
            {name: rms for name, key in keys.items() if (rms := state.get(f"{key}.{INPUT_RMS}")) is not None},
            lambda name: None if (known := state.get(f"{keys[name]}.weight.{FINGERPRINT}")) is None else int(known),
        ),
        source=str(path),
    )


def fingerprint_of_base(state: dict[str, Tensor]) -> str | None:
    """One number for all fingerprints in a state dict, in hexadecimal; None if it has none."""
    prints = [int(value) for key, value in sorted(state.items()) if key.endswith("." + FINGERPRINT)]
    total = 0
    for number in prints:
        total = (total * 0x100000001B3 + number) % (1 << 63)
    return f"{total:016x}" if prints else None


def read_state(path: str | os.PathLike[str], weights_only: bool = True) -> tuple[dict[str, Tensor], str]:
    """The state dict of the converted module in a checkpoint, and what its keys begin with.

    Args:
        path: A checkpoint, in one file or in shards.
        weights_only: As in `torch.load`: whether to refuse what is neither a tensor nor a plain value.
    """
    checkpoint = read_checkpoint(path, weights_only)
    if isinstance(checkpoint, dict):
        # Fabric saves under whatever name the user gave the module.
        for state in (checkpoint, *(v for v in checkpoint.values() if isinstance(v, dict))):
            for key in state:
                if str(key).rpartition(".")[2] == CONFIG:
                    return state, key[: -len(CONFIG)]
    raise ValueError(f"{path}: holds no {CONFIG!r}: it was not saved from a converted module.")
