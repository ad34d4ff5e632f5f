"""The first losses of a small random Llama in bf16: how much of the first, small updates arrives in a layer's output.

    python -m benchmarks.first_steps        # minutes on one core; needs peft and bitsandbytes

One batch, AdamW, learning rate 2e-4. A has the same distribution everywhere, and other random numbers in PEFT.
"""

import copy
import warnings

import peft
import torch
from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_qlora import convert

STEPS = 3
RANK = 16
LR = 2e-4
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
)
NAMES = [*(f"{name}_proj" for name in "qkvo"), "gate_proj", "up_proj", "down_proj"]


def losses(model: nn.Module, ids: Tensor) -> str:
    """The loss before each step."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    found = []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(f"{loss.item():.4f}")
    return ", ".join(found)


def ours(model: nn.Module) -> nn.Module:
    """The model with our layers."""
    torch.manual_seed(1)
    convert(model, r=RANK, lora_alpha=RANK, lora_dropout=0.0, deferred_logits=False)
    return model


def theirs(model: nn.Module, prepare: bool) -> nn.Module:
    """The model with bitsandbytes' layers and PEFT's adapter."""
    for part in [*model.modules()]:
        for name, layer in part.named_children():
            if name in NAMES:
                new = Linear4bit(
                    layer.in_features, layer.out_features, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16
                )
                new.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
                setattr(part, name, new)
    model.is_loaded_in_4bit = True
    if prepare:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules=NAMES, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).bfloat16()
    ids = torch.randint(0, CONFIG.vocab_size, (4, 128))
    print("| | losses before steps 0, 1, 2 |\n| --- | --- |")
    for name, made in (
        ("this package, bf16", lambda: ours(copy.deepcopy(model))),
        ("this package, fp32", lambda: ours(copy.deepcopy(model).float())),
        ("PEFT and bitsandbytes, fp32 between layers", lambda: theirs(copy.deepcopy(model), True)),
        ("PEFT and bitsandbytes, bf16", lambda: theirs(copy.deepcopy(model), False)),
    ):
        print(f"| {name} | {losses(made(), ids)} |", flush=True)


if __name__ == "__main__":
    main()
