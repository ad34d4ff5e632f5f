"""Words in messages: arguments of other libraries in our words, and how to install extras."""

import difflib
from collections.abc import Iterable

FOUR_BITS = "leave it out: the weights are always in 4 bits"
FOUND = "leave it out: it is found"
# Argument of another library -> what to do here. Those that resemble ours (`bnb_4bit_quant_type`) are found without it.
ARGUMENTS = {
    # transformers and bitsandbytes
    "load_in_4bit": FOUR_BITS, "load_in_8bit": "there is no 8-bit base here, only 4 bits",
    "bnb_4bit_quant_storage": "leave it out: 4-bit weights are uint8, FSDP2 included",
    "quantization_config": "pass its values: quant_type, double_quant, compute_dtype",
    "llm_int8_skip_modules": "use exclude_modules", "dtype": "use compute_dtype", "torch_dtype": "use compute_dtype",
    # PEFT
    "target_parameters": "use target_modules, which also takes the names of parameters that hold experts",
    "layers_to_transform": "use a regular expression in target_modules",
    "layers_pattern": "use a regular expression in target_modules",
    "bias": "biases stay frozen; modules_to_save trains a module in full",
    "lora_bias": "adapters have no bias; modules_to_save trains a module in full",
    "fan_in_fan_out": FOUND, "task_type": f"{FOUND}, and the head of a classification model trains",
    "inference_mode": "leave it out: call eval()",
    "peft_config": "pass the arguments themselves, or adapter=FOLDER for a saved adapter",
    # Lightning, LitGPT and torchtune
    "mode": "use quant_type and double_quant ('nf4-dq' is quant_type='nf4', double_quant=True)",
    "quantize": "use quant_type and double_quant ('bnb.nf4-dq' is quant_type='nf4', double_quant=True)",
    "ignore_modules": "use exclude_modules", "precision": "use compute_dtype", "quantize_base": FOUR_BITS,
    "lora_r": "use r", "lora_rank": "use r", "rank": "use r",
}  # fmt: skip


def install(extra: str) -> str:
    """The command that installs an extra of this package, which is on no package index yet."""
    return f'pip install ".[{extra}]" in a clone of the repository'


def refuse_unknown_arguments(given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise TypeError for an argument that does not exist; says what it is called here, if that is known."""
    allowed = list(allowed)
    for name in given:
        if name in allowed:
            continue
        similar = difflib.get_close_matches(name, allowed, 1)
        guess = f"did you mean {similar[0]}?" if similar else f"the arguments are {', '.join(allowed)}"
        raise TypeError(f"{name}: there is no such argument here; {ARGUMENTS.get(name, guess)}.".replace("?.", "?"))
