"""An adapter in PEFT's form: adapter_config.json and PEFT's tensors, from the layers of a module or of a checkpoint."""

import math
import re
from collections.abc import Collection, Mapping
from statistics import mode
from typing import Any

from lightning_qlora.adapters.adapter import MAGNITUDE, Adapter, State
from lightning_qlora.adapters.base_compatibility import (
    check_one_folder,
    read_quantization,
    required_base,
    subtract_initial,
)
from lightning_qlora.adapters.peft_config import BASE_MODEL, UNNAMED
from lightning_qlora.adapters.peft_experts import ExpertStack, without_place
from lightning_qlora.config import Base, QLoRAConfig
from lightning_qlora.layers.lora_layer import ADAPTER
from lightning_qlora.layers.names import join, last_part
from lightning_qlora.layers.trainable_tokens import TOKEN_ADAPTER


def to_peft(
    description: Mapping[str, Any],
    configs: Mapping[str, QLoRAConfig],
    layers: Mapping[str, State],
    base: Base = "quantized",
    as_parameters: Collection[str] = (),
    **others: Any,
) -> Adapter:
    """An adapter for this base, from `describe_base`, and the arguments and tensors of each layer by its name there.

    `layers` may have the initial values, which are subtracted for base="float". `as_parameters`: linear layers that
    PEFT adapts only as parameters. `others` are attributes of the adapter. ValueError if a folder has no place for
    layers with these arguments.
    """
    check_one_folder(configs)
    quantization = read_quantization(description["quantization"], others["source"])
    if base == "float" and required_base(quantization) is not None:
        layers = subtract_initial(layers, others["source"])
        quantization = None
        others |= {"fingerprints": {}, "bases": {}}
    stacks = {name: ExpertStack(*stack) for name, stack in description.get("experts", {}).items()}
    in_peft = {}
    for name, state in layers.items():
        if name in stacks:
            in_peft[stacks[name].key(name)] = stacks[name].to_peft(state)
        else:
            in_peft[name] = {key: state[key] for key in ADAPTER if key in state}
    config = _config(description, configs, layers, as_parameters)
    no_place = without_place(layers, stacks, config)
    return Adapter(config=config, layers=in_peft, quantization=quantization, no_place=no_place, **others)


def _config(
    description: Mapping[str, Any],
    configs: Mapping[str, QLoRAConfig],
    layers: Mapping[str, State],
    as_parameters: Collection[str],
) -> dict[str, Any]:
    use_rslora = all(config.use_rslora for config in configs.values())
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
    entries: dict[str, Any] = {}
    alphas = {name: round_alpha(alpha) for name, alpha in alphas.items()}
    for entry, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        most = mode(values.values())
        entries[entry] = most
        others = {name: value for name, value in values.items() if value != most}
        entries[pattern] = {"^" + re.escape(join(prefix, name)): value for name, value in others.items()}
    return entries


def round_alpha(alpha: float) -> float | int:
    """An alpha that was computed from a scaling, without its rounding error; an int if it is a whole number."""
    rounded = round(alpha, 9)
    if not math.isclose(rounded, alpha, rel_tol=1e-8):  # a very small one
        return alpha
    return int(rounded) if rounded == int(rounded) else rounded
