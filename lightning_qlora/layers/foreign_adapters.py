"""Adapters in a module before conversion, of other libraries or written by hand."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.layers.kinds import is_linear, kind_of
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import join

# Parameters or modules by their names in lower case.
PARTS = (
    ("lora_a", "lora_b"),  # loralib, LitGPT, PEFT and torchtune
    ("lora_down", "lora_up"),  # kohya-ss
    ("adapter_wte", "gating_factor"),  # LLaMA-Adapter in LitGPT
    ("adapter_bias", "adapter_scale"),  # its second version
)


def foreign_adapter(module: nn.Module) -> str | None:
    """What a module is, if it is an adapter of another library; None if it is none."""
    kind = f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
    for what, file, base in (("layer", "tuners.tuners_utils", "BaseTunerLayer"), ("model", "peft_model", "PeftModel")):
        peft = sys.modules.get(f"peft.{file}")
        if peft is not None and isinstance(module, getattr(peft, base)):
            return f"{kind}, a {what} with a PEFT adapter"
    held = {name.lower() for name in (*module._parameters.keys(), *module._modules.keys())}  # ScriptModules need keys()
    if not isinstance(module, LoRALayer) and any(a in held and b in held for a, b in PARTS):
        return f"{kind}, a layer that contains another library's adapter"
    return None


def hand_written_adapters(root: nn.Module) -> list[str]:
    """Names of the frozen linear layers with two trainable low-rank matrices beside them, [r, in] and [out, r].

    Their shapes tell, transposed or not. They are in the module that holds the layer, or in the layer itself.
    """
    found = []
    for name, module in root.named_modules():
        if isinstance(module, (LoRALayer, torch.jit.ScriptModule)):
            continue
        for key, layer in [("", module), *module.named_children()]:
            weight = layer._parameters.get("weight") if is_linear(layer) else None
            if weight is None or weight.requires_grad:
                continue
            own = {id(parameter) for parameter in layer.parameters()} if key else set()
            beside = [p for p in module.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in own]
            if len(beside) == 2 and _is_low_rank(layer, *beside):
                found.append(join(name, key))
    return found


def _is_low_rank(layer: Any, first: Tensor, second: Tensor) -> bool:
    """Whether two matrices can be A and B of a linear layer."""
    outputs, inputs = (getattr(layer, size) for size in kind_of(type(layer)).sizes)
    shapes = {tuple(sorted(first.shape)), tuple(sorted(second.shape))}
    for rank in first.shape:
        of_rank = {tuple(sorted((rank, inputs))), tuple(sorted((rank, outputs)))}
        if rank < min(inputs, outputs) and shapes == of_rank:
            return True
    return False
