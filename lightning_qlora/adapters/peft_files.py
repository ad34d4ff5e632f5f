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

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def write_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """Write PEFT's two files, each by a rename (`atomic_files`).

    Raises as `peft_tensors`.
    """
    # clone: safetensors refuses tensors that share memory, as the two names of a tied weight do.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in peft_tensors(adapter).items()}
    config = peft_config(adapter)
    with atomic_files(Path(folder)) as partial:
        write_safetensors(tensors, partial / WEIGHTS_FILE, metadata_of(adapter, tensors))
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """The content of adapter_config.json."""
    adapter = unstack_known(adapter)
    modules_to_save = [name for name in adapter.modules_to_save if last_part(name) != TOKEN_ADAPTER]
    config = {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.lora_dropout,
        "target_modules": adapter.target_modules,
        "modules_to_save": modules_to_save or None,
        "rank_pattern": exact(adapter.rank_pattern),
        "alpha_pattern": exact(adapter.alpha_pattern),
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "init_lora_weights": True,
        "bias": "none",
    }
    if adapter.tokens:
        config["trainable_token_indices"] = adapter.tokens
    if adapter.target_parameters:
        config["target_parameters"] = adapter.target_parameters
        config["lora_dropout"] = 0.0  # PEFT refuses parameters with dropout
    return config


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors; ValueError for experts that have no place there."""
    adapter = unstack_known(adapter)
    if adapter.expert_adapters:
        raise ValueError(
            f"{adapter.source}: only its model says which parameters these adapters of experts belong to. Load the "
            "adapter into the model (load_adapter) and save it from there."
        )
    tensors = {PREFIX + name: value for name, value in adapter.saved.items()}
    layers = {name: layer for name, layer in adapter.layers.items() if adapter.expert_parameter(name) is None}
    layers |= dict(stack_adapters(adapter, name) for name in adapter.experts)
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
        if layer.magnitude is not None:
            tensors[f"{PREFIX}{name}.{MAGNITUDE}"] = layer.magnitude
    return tensors


def exact(pattern: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The pattern with keys that match one name: PEFT matches them as regular expressions with the end of a name."""
    return {"^" + re.escape(join(prefix, name)): value for name, value in pattern.items()}
