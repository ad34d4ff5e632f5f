"""Models of the shapes of Llama with random weights, made on the device a layer at a time, so that none is ever dense.

Each maker gets a decoder layer in bf16 and turns it into what it measures: 4-bit layers of ours, of bitsandbytes with
PEFT's adapters, or dense ones with PEFT's adapters.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_qlora import convert

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
LLAMA_65B = {
    "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 64, "vocab_size": 32000,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip


def ours(layer: nn.Module, r: int) -> None:
    """Our 4-bit layers with adapters."""
    convert(layer, r=r, lora_alpha=16, lora_dropout=0.05)


def peft_bitsandbytes(layer: nn.Module, r: int) -> None:
    """PEFT's adapters on the 4-bit layers of bitsandbytes."""
    import bitsandbytes

    for name, linear in list(layer.named_modules()):
        if isinstance(linear, nn.Linear):
            packed = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16, True, "nf4"
            )
            packed.weight = bitsandbytes.nn.Params4bit(
                linear.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=packed
            )
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, packed.to(linear.weight.device))
    peft_bf16(layer, r)


def peft_bf16(layer: nn.Module, r: int) -> None:
    """PEFT's adapters on dense layers in bf16."""
    from peft import LoraConfig, inject_adapter_in_model

    layer.requires_grad_(False)
    linears = [name.rpartition(".")[2] for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=r, lora_alpha=16, lora_dropout=0.05, target_modules=sorted(set(linears)))
    inject_adapter_in_model(config, layer)


def build(shape: dict[str, int], make: Callable[[nn.Module, int], None], r: int, device: torch.device) -> nn.Module:
    """The language model in training mode with gradient checkpointing; only its adapters train."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(**{**shape, "num_hidden_layers": 0}, use_cache=False)
    with device:
        model = LlamaForCausalLM(config).bfloat16().requires_grad_(False)
    config.num_hidden_layers = shape["num_hidden_layers"]
    for index in range(config.num_hidden_layers):
        with device:
            layer = LlamaDecoderLayer(config, index).bfloat16()
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0, 0.02)
        make(layer, r)
        model.model.layers.append(layer)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def trainer(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    """A function that takes one step of AdamW on the adapters."""
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step
