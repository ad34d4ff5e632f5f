"""Words in messages: arguments of other libraries in our words, and how to install extras."""

import difflib
from collections.abc import Iterable

FOUR_BITS = "leave it out: the weights are always in 4 bits"
FOUND = "leave it out: it is found"
NO_EIGHT_BITS = "leave it out: there is no 8-bit base here, only 4 bits"
NOT_HERE = "it is not supported: adapters are LoRA, with use_rslora and use_dora if you wish"
NO_SUCH_START = "it is not supported: the initializations are those of init_lora_weights"
REGEX = "use a regular expression in target_modules"
TRAINS = "choose the layers in target_modules; the default 'all-linear' has all but the output embedding"
OPTIMIZER = "give it to your optimizer in configure_optimizers"
# Argument of another library -> what to do here. Those that contain ours (`bnb_4bit_quant_type`) are found without it.
ARGUMENTS = {
    # transformers and bitsandbytes
    "load_in_4bit": FOUR_BITS, "load_in_8bit": "there is no 8-bit base here, only 4 bits",
    "bnb_4bit_quant_storage": "leave it out: 4-bit weights are uint8, FSDP2 included",
    "quantization_config": "pass its values: quant_type, double_quant, compute_dtype",
    "llm_int8_skip_modules": "use exclude_modules", "llm_int8_threshold": NO_EIGHT_BITS,
    "llm_int8_has_fp16_weight": NO_EIGHT_BITS,
    "llm_int8_enable_fp32_cpu_offload": "leave it out: weights stay on the device of the model",
    "dtype": "use compute_dtype", "torch_dtype": "use compute_dtype",
    # PEFT
    "target_parameters": "use target_modules, which also takes the names of parameters that hold experts",
    "layers_to_transform": REGEX, "layers_pattern": REGEX,
    "bias": "biases stay frozen; modules_to_save trains a module in full",
    "lora_bias": "adapters have no bias; modules_to_save trains a module in full",
    "fan_in_fan_out": FOUND, "task_type": f"{FOUND}, and the head of a classification model trains",
    "inference_mode": "leave it out: call eval()",
    "peft_config": "pass the arguments themselves, or adapter=FOLDER for a saved adapter",
    "base_model_name_or_path": FOUND, "auto_mapping": FOUND, "peft_version": FOUND,
    "revision": "give it to from_pretrained, which loads the model",
    "ensure_weight_tying": "leave it out: tied weights stay tied",
    "layer_replication": "it is not supported: repeat the layers in the model, before conversion",
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config"), NO_SUCH_START),
    **dict.fromkeys(
        ("alora_invocation_tokens", "arrow_config", "kasa_config", "megatron_config", "megatron_core", "peft_type",
         "monteclora_config", "qalora_group_size", "runtime_config", "use_bdlora", "use_qalora", "velora_config"),
        NOT_HERE,
    ),
    # Lightning, LitGPT, torchtune and Unsloth
    "mode": "use quant_type and double_quant ('nf4-dq' is quant_type='nf4', double_quant=True)",
    "quantize": "use quant_type and double_quant ('bnb.nf4-dq' is quant_type='nf4', double_quant=True)",
    "ignore_modules": "use exclude_modules", "precision": "use compute_dtype", "quantize_base": FOUR_BITS,
    "lora_r": "use r", "lora_rank": "use r", "rank": "use r", "alpha": "use lora_alpha", "dropout": "use lora_dropout",
    **dict.fromkeys(
        ("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp", "lora_head", "lora_attn_modules",
         "apply_lora_to_mlp", "apply_lora_to_output", "finetune_vision_layers", "finetune_language_layers",
         "finetune_attention_modules", "finetune_mlp_modules", "finetune_audio_layers", "finetune_last_n_layers"),
        TRAINS,
    ),
    "random_state": "call seed_everything", "max_seq_length": "leave it out: batches have the length of your data",
    **dict.fromkeys(("lr", "learning_rate", "weight_decay", "optim"), OPTIMIZER),
}  # fmt: skip


def install(extra: str) -> str:
    """The command that installs an extra of this package, which is on no package index yet."""
    return f'pip install ".[{extra}]" in a clone of the repository'


def refuse_unknown_arguments(given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise TypeError for an argument that does not exist; says what it is called here, if that is known."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            raise TypeError(f"{name}: there is no such argument here; {_answer(name, allowed)}")


def _answer(name: str, allowed: list[str]) -> str:
    """What to do instead, from the table; or an argument that is contained in this one; or one with a typing error."""
    if name in ARGUMENTS:
        return f"{ARGUMENTS[name]}."
    contained = [own for own in allowed if "_" in own and f"_{own}_" in f"_{name}_"]
    if similar := contained or difflib.get_close_matches(name, allowed, 1, 0.8):
        return f"did you mean {max(similar, key=len)}?"
    return f"the arguments are {', '.join(allowed)}."
