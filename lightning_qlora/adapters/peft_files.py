"""Writes PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

Source of the format: peft/utils/save_and_load.py and peft/tuners/lora/config.py (0.17 to 0.21).
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_qlora.adapters.adapter import MAGNITUDE, PREFIX, Adapter
from lightning_qlora.adapters.peft_experts import stack_adapters, unstack_known
from lightning_qlora.adapters.peft_metadata import metadata_of
from lightning_qlora.files.folder_writer import atomic_files
from lightning_qlora.files.safetensors_folder import write_safetensors
from lightning_qlora.layers.dotted_names import join, last_part
from lightning_qlora.layers.trainable_tokens import TOKEN_ADAPTER

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def write_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """Write PEFT's two files, each by a rename (`atomic_files`).

    Raises as `peft_tensors`.
    """
    tensors, config = peft_tensors(adapter), peft_config(adapter)
    # clone: safetensors refuses tensors that share memory, as the two names of a tied weight do.
    whole = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    with atomic_files(Path(folder)) as partial:
        write_safetensors(whole, partial / WEIGHTS_FILE, metadata_of(adapter, whole))
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The content of adapter_config.json."""
    adapter = unstack_known(adapter)
    parameters = adapter.target_parameters
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0 if parameters else adapter.lora_dropout,  # PEFT refuses parameters with dropout
        "target_modules": adapter.target_modules,
        **({"target_parameters": parameters} if parameters else {}),
        "modules_to_save": [n for n in adapter.modules_to_save if last_part(n) != TOKEN_ADAPTER] or None,
        **({"trainable_token_indices": adapter.tokens} if adapter.tokens else {}),
        "rank_pattern": exact(adapter.rank_pattern),
        "alpha_pattern": exact(adapter.alpha_pattern),
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "init_lora_weights": True,
        "bias": "none",
    }


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors; ValueError, with the parameter, for experts without a place there."""
    adapter = unstack_known(adapter)
    if adapter.expert_adapters:
        raise ValueError(
            f"{adapter.source}: only its model says which parameters these adapters of experts belong to. Load the "
            "adapter into the model (load_adapter) and save it from there."
        )
    tensors = {PREFIX + name: value for name, value in adapter.saved.items()}
    layers = {name: layer for name, layer in adapter.layers.items() if adapter.expert_parameter(name) is None}
    for name, layer in (layers | dict(stack_adapters(adapter, name) for name in adapter.experts)).items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = layer.magnitude
    return tensors


def exact(pattern: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """PEFT matches a key of a pattern as a regular expression with the end of a name: here with one name only."""
    return {"^" + re.escape(join(prefix, name)): value for name, value in pattern.items()}
