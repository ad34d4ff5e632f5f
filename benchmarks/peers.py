"""The peers: how each turns dense linear layers into frozen ones with LoRA adapters beside them.

Every entry of `VARIANTS` takes a module and returns it, or it in a wrapper, with trainable adapters: rank r, alpha 2 r,
no dropout. A peer that is not installed is left out, by name.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lightning_qlora import convert

OURS = "lightning_qlora"
DENSE = "PEFT on bf16"
BNB = "PEFT + bitsandbytes"
BNB_BF16 = "PEFT + bitsandbytes, bf16 adapters"
TORCHAO = "torchao NF4 + LoRA"


def why_missing(*packages: str) -> str | None:
    """Why one of the packages cannot be imported; None if all can."""
    for package in packages:
        try:
            import_module(package)
        except Exception as error:  # for example a library for another CUDA version
            return f"{package}: {type(error).__name__}: {str(error)[:200]}"
    return None


def linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """All linear layers except the output embedding, as (parent, name in the parent, layer)."""
    return [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear) and name != "lm_head"
    ]


def bnb_linear(layer: nn.Linear) -> nn.Module:
    """bitsandbytes' own 4-bit layer: NF4 with double quantization, computing in the type of the weight."""
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(  # type: ignore[attr-defined]
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",  # random weights on the host, only to replace them, would take half a minute for an 8B model
    )
    made.weight = bnb.nn.Params4bit(  # type: ignore[attr-defined]
        layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
    )
    made.bias = layer.bias
    return made.to(layer.weight.device)  # this quantizes the weight


class TorchaoLoRA(nn.Module):
    """torchao's NF4 tensor with an adapter written by hand, since torchao has none."""

    def __init__(self, layer: nn.Linear, r: int) -> None:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

        super().__init__()
        self.linear = linear_nf4
        weight = layer.weight.data
        group = 256
        while (weight.numel() // 64) % group:
            group //= 2
        self.weight = nn.Parameter(to_nf4(weight, 64, group), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(r, layer.in_features) * layer.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(layer.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        adapter = nn.functional.linear(nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return self.linear(x, self.weight) + (adapter * 2.0).to(x.dtype)


def with_peft(model: nn.Module, r: int, alpha: float, dropout: float, fp32: bool) -> nn.Module:
    """Add PEFT adapters in place, in fp32 or in the type of the layers; returns PEFT's wrapper."""
    from peft import LoraConfig, get_peft_model

    names = sorted({name for _, name, _ in linears(model)})
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=names)
    if any(type(layer).__name__ == "Linear4bit" for _, _, layer in linears(model)):
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT checks this attribute, not the class of the layers
    return get_peft_model(model, config, autocast_adapter_dtype=fp32)


def with_bnb(model: nn.Module) -> nn.Module:
    """Replace the linear layers by the 4-bit layers of bitsandbytes, in place."""
    for parent, name, layer in linears(model):
        setattr(parent, name, bnb_linear(layer))
    return model


def _torchao(model: nn.Module, r: int) -> nn.Module:
    model.requires_grad_(False)
    for parent, name, layer in linears(model):
        setattr(parent, name, TorchaoLoRA(layer, r))
    return model


def _ours(model: nn.Module, r: int) -> nn.Module:
    convert(model, r=r, lora_alpha=2 * r, lora_dropout=0.0)
    return model


VARIANTS: dict[str, tuple[str, Callable[[nn.Module, int], nn.Module]]] = {
    OURS: ("torch", _ours),
    BNB: ("bitsandbytes peft", lambda model, r: with_peft(with_bnb(model), r, 2 * r, 0.0, fp32=True)),
    BNB_BF16: ("bitsandbytes peft", lambda model, r: with_peft(with_bnb(model), r, 2 * r, 0.0, fp32=False)),
    DENSE: ("peft", lambda model, r: with_peft(model, r, 2 * r, 0.0, fp32=False)),
    TORCHAO: ("torchao", _torchao),
}


def installed() -> list[str]:
    """The variants that can run here; says which cannot."""
    found = []
    for name, (needs, _) in VARIANTS.items():
        missing = [package for package in needs.split() if find_spec(package) is None]
        if missing:
            print(f"skipped: {name} (not installed: {', '.join(missing)})")
        else:
            found.append(name)
    return found


def build(name: str, model: nn.Module, r: int) -> nn.Module:
    """A module made into the named variant."""
    return VARIANTS[name][1](model, r)
