"""The adapters in a Lightning checkpoint, read without the module."""

import os

from torch import Tensor

from lightning_qlora.adapters.adapter import Adapter, check_state
from lightning_qlora.adapters.peft_layers import to_peft
from lightning_qlora.checkpoints.saved_conversion import SavedConversion, read_conversion
from lightning_qlora.checks import DAMAGED
from lightning_qlora.config import Base
from lightning_qlora.files.lightning_checkpoint import check_dense, read_checkpoint
from lightning_qlora.layers.layer_state import check_tensors_of_layer, read_base
from lightning_qlora.layers.lora_layer import ADAPTER, INITIAL
from lightning_qlora.layers.names import check_keys, last_part, named, owner_name, without_wrappers
from lightning_qlora.survey.records import CONVERSION
from lightning_qlora.tensors.fingerprint import fingerprint_of_weights

DESCRIPTION = (
    "prefix",
    "trained_in_full",
    "task_type",
    "base_model",
    "fan_in_fan_out",
    "quantization",
    "target_modules",
)


def read_adapter_from_checkpoint(
    path: str | os.PathLike[str], weights_only: bool = True, base: Base = "quantized"
) -> Adapter:
    """The adapters that `get_adapter` would return for the module that was saved.

    The checkpoint is of the Trainer, ModelCheckpoint or Fabric, in one file or in shards. `weights_only` refuses
    objects other than tensors and plain values, as in `torch.load`. FileNotFoundError or ValueError if there is no such
    file, or it was not saved from a converted module.
    """
    state, root, conversion = _read_converted_state_dict(path, weights_only)
    description = conversion.base
    if not description.keys() >= {*DESCRIPTION}:
        raise ValueError(f"{path}: its {CONVERSION!r} does not name the base model. {DAMAGED}")
    outer = without_wrappers(root)
    if description["prefix"]:
        outer += f"{description['prefix']}."
    names = conversion.names_of_layers(state, root)
    if not names:
        raise ValueError(f"{path}: no adapter.")
    configs = {}
    layers = {}
    fingerprints = dict(conversion.fingerprints)
    bases = {}
    for prefix, name in sorted(names.items()):
        name = name.removeprefix(outer)  # in the base model
        configs[name] = conversion.config.with_own(conversion.base["layers"].get(name, {}))
        with named(path):
            check_tensors_of_layer(state, prefix)
            weights = read_base(state, prefix)
        layers[name] = {key: state[prefix + key] for key in (*ADAPTER, *INITIAL) if prefix + key in state}
        check_state(f"{path}: {prefix.removesuffix('.')}:", layers[name], dimensions=(2, 3))
        full_name = prefix.removeprefix(root).removesuffix(".")
        if full_name in fingerprints:
            fingerprints[name] = fingerprints.pop(full_name)
        if weights:
            bases[name] = weights
            fingerprints[name] = fingerprint_of_weights(weights)
    owners = {outer + owner for owner in description["trained_in_full"]}
    saved = {}
    for key, value in state.items():
        if owner_name(without_wrappers(key)) in owners:
            check_dense(f"{path}: {key}", value)
            saved[without_wrappers(key).removeprefix(outer)] = value
    others = {"saved": saved, "bases": bases, "fingerprints": fingerprints, "source": str(path)}
    return to_peft(description, configs, layers, conversion.quantization, base, **others)


def _read_converted_state_dict(
    path: str | os.PathLike[str], weights_only: bool
) -> tuple[dict[str, Tensor], str, SavedConversion]:
    checkpoint = read_checkpoint(path, weights_only)
    if isinstance(checkpoint, dict):
        # Fabric saves the module under a name that the user chooses.
        for state in (checkpoint, *(value for value in checkpoint.values() if isinstance(value, dict))):
            for key in state:
                if last_part(str(key)) == CONVERSION:
                    prefix = key[: -len(CONVERSION)]
                    with named(path):
                        check_keys(state)
                        conversion = read_conversion(state, prefix)
                    assert conversion is not None
                    return state, prefix, conversion
    raise ValueError(
        f"{path}: holds no {CONVERSION!r}: it was not saved from a converted module. Pass a checkpoint of a run with "
        "QLoRAPrecision, or the folder of an adapter."
    )
