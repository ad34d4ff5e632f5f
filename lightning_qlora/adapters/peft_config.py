"""PEFT's adapter_config.json: read with checks, and written.

Source of the format: peft/tuners/lora/config.py (0.17 to 0.21).
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mode
from typing import Any

from lightning_qlora.adapters.adapter import MAGNITUDE, State
from lightning_qlora.checks import check_bool, check_choice, check_names, check_string, shown
from lightning_qlora.config import CHECKS as OF_ARGUMENTS
from lightning_qlora.config import QLoRAConfig, arguments_that
from lightning_qlora.files.safetensors_folder import read_json
from lightning_qlora.layers.names import TOKEN_ADAPTER, join, last_part

CONFIG_FILE = "adapter_config.json"
BASE_MODEL = "base_model_name_or_path"
UNNAMED = ("", "None")  # transformers' names of a model that was not loaded from a folder
DEFAULTS: dict[str, Any] = {"peft_type": "", "r": 8, "lora_alpha": 8}  # PEFT's
UNSET: dict[str, Any] = {  # what null stands for there, and an entry that is missing
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    BASE_MODEL: None,
}
# PEFT's arguments for adapters that QLoRALinear does not compute, but for those that are arguments of ours as well.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
MERGE_IN_PEFT = "Merge it in PEFT (merge_and_unload), and use the merged model."
# PEFT's initializations that change the base weights (peft/tuners/lora/layer.py, update_layer). The adapter fits only
# the changed weights, and its folder does not contain them.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_peft_config(path: Path) -> dict[str, Any]:
    """The content of the file, with values for the entries of DEFAULTS and UNSET.

    FileNotFoundError or ValueError if it is missing or broken, or QLoRALinear does not compute this kind of adapter.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. PEFT writes it into the folder of an adapter.")
    config = read_json(path)
    config |= {name: value for name, value in DEFAULTS.items() if name not in config}
    for name, check in CHECKS.items():
        if config.get(name) is not None or name in DEFAULTS:
            try:
                check(name, config[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from None
    if config.get(BASE_MODEL) in UNNAMED:
        config[BASE_MODEL] = None
    return config | {name: value for name, value in UNSET.items() if config.get(name) is None}


def config_for_peft(
    description: Mapping[str, Any], configs: Mapping[str, QLoRAConfig], layers: Mapping[str, State]
) -> dict[str, Any]:
    """The content of the file for layers with these arguments and tensors, by their names in `describe_base`."""
    use_rslora = all(config.use_rslora for config in configs.values())
    as_parameters = {*description.get("parameters", [])}
    ranks = {}
    alphas = {}
    for name, config in configs.items():
        r = layers[name]["lora_A"].shape[-2]
        alpha = config.lora_alpha
        if (config.r, config.use_rslora) != (r, use_rslora):  # what keeps the scaling in the folder
            alpha = config.scaling * (math.sqrt(r) if use_rslora else r)
        if name in as_parameters:
            name += ".weight"
        ranks[name] = r
        alphas[name] = alpha
    most = ranks_and_alphas(ranks, alphas)
    modules_to_save = [name for name in sorted(description["trained_in_full"]) if last_part(name) != TOKEN_ADAPTER]
    base_model = description["base_model"]
    entries = {
        "peft_type": "LORA",
        "task_type": description["task_type"],
        BASE_MODEL: None if base_model in UNNAMED else base_model,
        "inference_mode": True,
        "r": most["r"],
        "lora_alpha": most["lora_alpha"],
        "lora_dropout": next(iter(configs.values())).lora_dropout,
        "target_modules": description["target_modules"],
        "modules_to_save": modules_to_save or None,
        "rank_pattern": most["rank_pattern"],
        "alpha_pattern": most["alpha_pattern"],
        "use_rslora": use_rslora,
        "use_dora": any(MAGNITUDE in state for state in layers.values()),
        "fan_in_fan_out": description["fan_in_fan_out"],
        "init_lora_weights": True,
        "bias": "none",
    }
    if description.get("tokens"):
        entries["trainable_token_indices"] = description["tokens"]
    parameters = [*description.get("experts", {}), *(f"{name}.weight" for name in as_parameters)]
    if parameters:
        entries["target_parameters"] = sorted(parameters)
        entries["lora_dropout"] = 0.0  # PEFT refuses parameters with dropout
    return entries


def ranks_and_alphas(ranks: dict[str, int], alphas: dict[str, float], prefix: str = "") -> dict[str, Any]:
    """The entries for ranks and alphas of layers: those of most layers, and patterns for the others.

    A pattern matches one name only, with `prefix` before it: PEFT takes a key for a regular expression of endings.
    """
    alphas = {name: round_alpha(alpha) for name, alpha in alphas.items()}
    entries: dict[str, Any] = {}
    for entry, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        most = mode(values.values())
        others = {name: value for name, value in values.items() if value != most}
        entries[entry] = most
        entries[pattern] = {"^" + re.escape(join(prefix, name)): value for name, value in others.items()}
    return entries


def round_alpha(alpha: float) -> float | int:
    """An alpha that was computed from a scaling, without its rounding error; an int if it is a whole number."""
    rounded = round(alpha, 9)
    if not math.isclose(rounded, alpha, rel_tol=1e-8):  # a very small one
        return alpha
    return int(rounded) if rounded == int(rounded) else rounded


def _check_unset(name: str, value: Any, is_set: Callable[[Any], bool] = bool) -> None:
    if is_set(value):
        raise ValueError(f"{name}={shown(value)}: adapters of this kind can't be read. {MERGE_IN_PEFT}")


def _check_initialization(name: str, value: Any) -> None:
    if isinstance(value, str) and value.lower().startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"{name}={shown(value)}: PEFT changed the base weights for this initialization, and the adapter fits only "
            "those. Save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which makes it "
            "a plain adapter. 'loftq' can be merged in PEFT instead."
        )


def _check_targets(name: str, value: Any) -> None:
    if not isinstance(value, str):
        check_names(name, value, or_regex=True)


# Checks of the values in adapter_config.json. A value that is null stands for PEFT's default.
CHECKS: dict[str, Callable[[str, Any], None]] = {
    "peft_type": partial(check_choice, allowed=("LORA",)),
    **dict.fromkeys(UNSUPPORTED, _check_unset),
    "bias": partial(_check_unset, is_set=lambda value: value != "none"),
    "init_lora_weights": _check_initialization,
    **{name: OF_ARGUMENTS[name] for name in arguments_that("in_peft")},
    "fan_in_fan_out": check_bool,
    "task_type": check_string,
    BASE_MODEL: check_string,
    "target_parameters": check_names,
    "target_modules": _check_targets,
}
