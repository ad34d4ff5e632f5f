"""PEFT's `adapter_config.json`, read and checked: what it may say, and what QLoRALinear computes of it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_qlora.config import check_regex
from lightning_qlora.files import read_json

# Choices of PEFT that change what an adapter computes and that QLoRALinear does not compute.
UNSUPPORTED = (
    "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "target_parameters",
    "trainable_token_indices", "layer_replication", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Starts of PEFT's that change the base's weights (peft/tuners/lora/layer.py, update_layer): those adapters belong to
# weights that a folder does not hold. PEFT changes the base again when it loads most of them.
MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
ALPHA = 8  # PEFT's default


def read_config(path: Path) -> dict[str, Any]:
    """What the file says, with a lora_alpha in any case.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is broken, a value is of another type than PEFT writes, or the adapter is of a kind that
            QLoRALinear does not compute; names file and key.
    """
    config = {"lora_alpha": ALPHA, **read_json(path)}
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' can be read.")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias={config['bias']!r}: adapters that train biases can't be read, only 'none'.")
    for name in UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{path}: {name}={config[name]!r}: adapters of this kind can't be read.")
    _check_start(path, config.get("init_lora_weights"))
    _check_values(path, config)
    return config


def _check_start(path: Path, start: Any) -> None:
    if isinstance(start, str) and start.lower().startswith(MOVE_THE_BASE):
        raise ValueError(
            f"{path}: init_lora_weights={start!r}: PEFT changed the base's weights for this start, and the adapter "
            "belongs to those. Save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), "
            "which makes it a plain adapter; merge one of 'loftq' in PEFT."
        )


def _check_values(path: Path, config: dict[str, Any]) -> None:
    _check(path, "lora_alpha", config["lora_alpha"], _is_number, "a number")
    for name, (good, allowed) in VALUES.items():
        if config.get(name) is not None:
            _check(path, name, config[name], good, allowed)
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        check_regex(f"{path}: alpha_pattern", pattern)
        _check(path, f"alpha_pattern[{pattern!r}]", alpha, _is_number, "a number")


def _check(path: Path, name: str, value: Any, good: Callable[[Any], bool], allowed: str) -> None:
    if not good(value):
        raise ValueError(f"{path}: {name}={value!r}: must be {allowed}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


# What is read of the file, where it is there: whether a value is good, and in words what it must be.
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_rslora": (_is(bool), "true or false"),
    "use_dora": (_is(bool), "true or false"),
    "fan_in_fan_out": (_is(bool), "true or false"),
    "task_type": (_is(str), "a string"),
    "base_model_name_or_path": (_is(str), "a string"),
    "lora_dropout": (_is_number, "a number"),
    "modules_to_save": (_is_names, "a list of names"),
    "target_modules": (lambda value: isinstance(value, str) or _is_names(value), "names or a regular expression"),
    "alpha_pattern": (_is(dict), "an object of names and numbers"),
}
