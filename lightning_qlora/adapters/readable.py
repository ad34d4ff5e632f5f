"""Which of PEFT's adapters a QLoRALinear computes, by their adapter_config.json; others are refused with the reason."""

from pathlib import Path
from typing import Any

# Choices of PEFT that change what an adapter computes and that QLoRALinear does not compute.
UNSUPPORTED = (
    "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "target_parameters",
    "trainable_token_indices", "layer_replication", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# Starts of PEFT's that change the base's weights (peft/tuners/lora/layer.py, update_layer): those adapters belong to
# weights that a folder does not hold. PEFT changes the base again when it loads most of them.
MOVE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_readable(config: dict[str, Any], path: Path) -> None:
    """Raise ValueError, which names the file and the choice, unless an adapter of this config can be read."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}; only 'LORA' can be read.")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias={config['bias']!r}: adapters that train biases can't be read, only 'none'.")
    for name in UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{path}: {name}={config[name]!r}: adapters of this kind can't be read.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVE_THE_BASE):
        raise ValueError(
            f"{path}: init_lora_weights={start!r}: PEFT changed the base's weights for this start, and the adapter "
            "belongs to those. Save it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), "
            "which makes it a plain adapter; merge one of 'loftq' in PEFT."
        )
