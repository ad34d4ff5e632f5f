"""Llama models with random weights, built on the device layer by layer, so that no model is ever completely dense.

A variant defines how each decoder layer is quantized and how the finished model gets its adapters. All variants have
the same base weights, so their losses can be compared.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import peers
from benchmarks.timing import Function
from lightning_qlora import convert

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_65B = {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "vocab_size": 32000,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
ALPHA, DROPOUT = 16, 0.05  # the QLoRA paper's
UNSLOTH = "Unsloth-style layer"


@dataclass(frozen=True)
class Variant:
    """One way to train adapters on a frozen base model.

    Attributes:
        packages: Packages it needs.
        quantize: Quantizes one bf16 decoder layer in place; takes the layer and the rank.
        adapt: Adds adapters to the finished model in place; takes the model and the rank.
    """

    packages: tuple[str, ...]
    quantize: Callable[[nn.Module, int], None]
    adapt: Callable[[nn.Module, int], None]


def _ours(layer: nn.Module, r: int) -> None:
    convert(layer, r=r, lora_alpha=ALPHA, lora_dropout=DROPOUT)


def _bnb(layer: nn.Module, r: int) -> None:
    peers.with_bnb(layer)


def _unsloth(layer: nn.Module, r: int) -> None:
    from benchmarks.gpu_cells.unsloth import UnslothLinear

    for parent, name, linear in peers.linears(layer):
        setattr(parent, name, UnslothLinear(linear, r, ALPHA / r))


def _peft(model: nn.Module, r: int, fp32: bool) -> None:
    peers.with_peft(model, r, ALPHA, DROPOUT, fp32)


def _nothing(module: nn.Module, r: int) -> None:
    pass


VARIANTS = {
    peers.OURS: Variant((), _ours, _nothing),
    peers.DENSE: Variant(("peft",), _nothing, partial(_peft, fp32=True)),
    peers.BNB: Variant(("peft", "bitsandbytes"), _bnb, partial(_peft, fp32=True)),
    peers.BNB_BF16: Variant(("peft", "bitsandbytes"), _bnb, partial(_peft, fp32=False)),
    UNSLOTH: Variant(("bitsandbytes",), _unsloth, _nothing),
}


def build(
    shape: dict[str, int], variant: Variant, r: int, device: torch.device, like: nn.Module | None = None
) -> nn.Module:
    """The language model in training mode with gradient checkpointing; only its adapters train.

    Args:
        shape: Sizes, as transformers' LlamaConfig names them.
        variant: One of `VARIANTS`.
        r: Rank of the adapters.
        device: Where to build it.
        like: A model whose frozen embedding weights are shared.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(**{**shape, "num_hidden_layers": 0}, use_cache=False)
    torch.manual_seed(0)
    with device, _default_dtype(torch.bfloat16):
        model = LlamaForCausalLM(config).requires_grad_(False)
    if like is not None:
        model.get_input_embeddings().weight = like.get_input_embeddings().weight  # type: ignore[operator]
        model.get_output_embeddings().weight = like.get_output_embeddings().weight  # type: ignore[operator]
    config.num_hidden_layers = shape["num_hidden_layers"]
    for index in range(config.num_hidden_layers):
        torch.manual_seed(index)
        with device, _default_dtype(torch.bfloat16):
            layer = LlamaDecoderLayer(config, index).requires_grad_(False)
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(0, 0.02)
        variant.quantize(layer, r)
        model.model.layers.append(layer)
    with device:
        variant.adapt(model, r)
    # After `adapt`: if checkpointing were on, PEFT would compute the gradient of the first layer's input as well.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def adapters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: nn.Module) -> Optimizer:
    """torch's AdamW over the parameters that train."""
    trained = adapters(model)
    return torch.optim.AdamW(trained, lr=1e-4, fused=trained[0].is_cuda)


def trainer(model: nn.Module, optimizer: Optimizer, tokens: Tensor) -> Function:
    """A function that does one training step under autocast to bf16 and returns the loss."""

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
