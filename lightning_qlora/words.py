"""Words in messages: ours for those of PEFT, bitsandbytes, LitGPT, torchtune and Unsloth, and how to install extras."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

FOUR_BITS = "leave it out: the weights are always in 4 bits"
ARGUMENTS = {  # argument of another library -> what to do here
    "load_in_4bit": FOUR_BITS, "quantize_base": FOUR_BITS, "bits": FOUR_BITS,
    "load_in_8bit": "there is no 8-bit base here, only 4 bits",
    "bnb_4bit_quant_type": "use quant_type", "bnb_4bit_compute_dtype": "use compute_dtype",
    "bnb_4bit_use_double_quant": "use double_quant", "use_double_quant": "use double_quant",
    "compress_statistics": "use double_quant", "blocksize": "use block_size", "group_size": "use block_size",
    "bnb_4bit_quant_storage": "leave it out: 4-bit weights are uint8, FSDP2 included",
    "quant_storage": "leave it out: 4-bit weights are uint8, FSDP2 included",
    "quantization_config": "pass its values: quant_type, double_quant, compute_dtype",
    "llm_int8_skip_modules": "use exclude_modules",
    "mode": "use quant_type and double_quant ('nf4-dq' is quant_type='nf4', double_quant=True)",
    "quantize": "use quant_type and double_quant ('bnb.nf4-dq' is quant_type='nf4', double_quant=True)",
    "ignore_modules": "use exclude_modules", "dtype": "use compute_dtype",
    "torch_dtype": "use compute_dtype", "precision": "use compute_dtype",
    "lora_r": "use r", "lora_rank": "use r", "rank": "use r", "alpha": "use lora_alpha", "dropout": "use lora_dropout",
    "lora_target_modules": "use target_modules", "lora_attn_modules": "use target_modules",
    "apply_lora_to_mlp": "use target_modules", "apply_lora_to_output": "name the output layer in target_modules",
    "lora_query": "use target_modules", "lora_key": "use target_modules", "lora_value": "use target_modules",
    "lora_projection": "use target_modules", "lora_mlp": "use target_modules",
    "lora_head": "name the output layer in target_modules",
    "target_parameters": "use target_modules, which also takes the names of parameters that hold experts",
    "layers_to_transform": "use a regular expression in target_modules",
    "layers_pattern": "use a regular expression in target_modules",
    "trainable_token_indices": "name the embedding in modules_to_save",
    "bias": "biases stay frozen; modules_to_save trains a module in full",
    "lora_bias": "adapters have no bias; modules_to_save trains a module in full",
    "fan_in_fan_out": "leave it out: it is found",
    "task_type": "leave it out: it is found, and the head of a classification model trains",
    "inference_mode": "leave it out: call eval()",
    "use_gradient_checkpointing": "use gradient_checkpointing",
    "activation_checkpointing": "use gradient_checkpointing",
    "enable_activation_checkpointing": "use gradient_checkpointing",
    "random_state": "call lightning.pytorch.seed_everything", "seed": "call lightning.pytorch.seed_everything",
    "optim": "the optimizer is that of configure_optimizers", "lr": "it belongs to the optimizer",
    "learning_rate": "it belongs to the optimizer",
    "max_seq_length": "the data decide the length; estimate_memory has sequence_length",
    "peft_config": "pass the arguments themselves, or adapter=FOLDER for a saved adapter",
    "paged": "use paged_optimizer", "pretrained_adapter": "use adapter",
}  # fmt: skip
_DTYPES = {
    "bf16": ("bfloat16", "torch.bfloat16", "bf16-true", "bf16-mixed"),
    "fp16": ("float16", "torch.float16", "half", "16-true", "16-mixed"),
    "fp32": ("float32", "torch.float32", "float", "32-true"),
}
VALUES: dict[tuple[str, Any], str] = {  # argument and value of another library -> ours
    **{("quant_type", f"{kind}-dq"): f"quant_type={kind!r}, double_quant=True" for kind in ("nf4", "fp4")},
    **{("quant_type", f"bnb.{kind}-dq"): f"quant_type={kind!r}, double_quant=True" for kind in ("nf4", "fp4")},
    **{("quant_type", f"bnb.{kind}"): f"quant_type={kind!r}, double_quant=False" for kind in ("nf4", "fp4")},
    **{("quant_type", kind): "quant_type='nf4'" for kind in ("int8", "int8-training", "bnb.int8", "8bit", "4bit")},
    **{("compute_dtype", word): f"compute_dtype={ours!r}" for ours, words in _DTYPES.items() for word in words},
    ("init_lora_weights", True): "init_lora_weights='default'",
    ("init_lora_weights", "lora"): "init_lora_weights='default'",
    ("init_lora_weights", "qera"): "init_lora_weights='calibrated'",
    ("gradient_checkpointing", "unsloth"): "gradient_checkpointing=True",
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


def our_value(name: str, value: Any) -> str:
    """A sentence with our arguments for a value that another library takes; empty for other values."""
    ours = VALUES.get((name, value)) if isinstance(value, (str, bool)) else None
    return f" Use {ours}." if ours else ""


def our_words(message: str) -> str:
    """What to do here, a line each, for the arguments and values of other libraries that jsonargparse refuses."""
    names = re.findall(r"Option '(\w+)' is not accepted|--(\w+)", message)
    known = [f"{name}: {ARGUMENTS[name]}." for pair in names if (name := "".join(pair)) in ARGUMENTS]
    refused = re.findall(r'"([\w.]+)":\s+Expected a [^\n]*Got value: (\S+)', message)
    known += [f"{name}:{ours}" for name, value in refused if (ours := our_value(name.rpartition(".")[2], value))]
    return "".join(f"\n{line}" for line in known)
