"""Words in messages: arguments of other libraries in our words, and how to install extras."""

import difflib
from collections.abc import Iterable

# Argument of another library -> what to do here. Names that contain ours (`bnb_4bit_quant_type`) need no entry.
ARGUMENTS = {
    "load_in_4bit": "leave it out: the weights are always in 4 bits",
    "load_in_8bit": "there is no 8-bit base here, only 4 bits",
    "bnb_4bit_quant_storage": "leave it out: 4-bit weights are uint8, FSDP2 included",
    "quantization_config": "pass its values: quant_type, double_quant, compute_dtype",
    "llm_int8_skip_modules": "use exclude_modules",
    "dtype": "use compute_dtype",
    "torch_dtype": "use compute_dtype",
    "precision": "use compute_dtype",
    "mode": "use quant_type and double_quant ('nf4-dq' is quant_type='nf4', double_quant=True)",
    "peft_config": "pass the arguments themselves, or adapter=FOLDER for a saved adapter",
    "target_parameters": "use target_modules, which also takes the names of parameters that hold experts",
    "layers_to_transform": "use a regular expression in target_modules",
    "bias": "biases stay frozen; modules_to_save trains a module in full",
    "task_type": "leave it out: it is found, and the head of a classification model trains",
    "inference_mode": "leave it out: call eval()",
    "lora_r": "use r",
    "rank": "use r",
    "alpha": "use lora_alpha",
    "dropout": "use lora_dropout",
    "lr": "give it to your optimizer in configure_optimizers",
}


def install(extra: str) -> str:
    """The command that installs an extra of this package, which is on no package index yet."""
    return f'pip install ".[{extra}]" in a clone of the repository'


def refuse_unknown_arguments(names: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise TypeError for an argument that does not exist, with our name for it, if that is known."""
    allowed = list(allowed)
    for name in names:
        if name not in allowed:
            raise TypeError(f"{name}: there is no such argument here; {_answer(name, allowed)}")


def _answer(name: str, allowed: list[str]) -> str:
    """What to do instead, from the table; else the argument with a similar name."""
    if name in ARGUMENTS:
        return f"{ARGUMENTS[name]}."
    contained = [argument for argument in allowed if "_" in argument and f"_{argument}_" in f"_{name}_"]
    similar = contained or difflib.get_close_matches(name, allowed, 1, 0.8)
    if similar:
        return f"did you mean {max(similar, key=len)}?"
    return f"the arguments are {', '.join(allowed)}."
