"""LoRA that other libraries put into a module before conversion: it would be frozen, or trained beside ours."""

import sys
from typing import Any

from torch import nn

from lightning_qlora.layers.lora import LoRALayer

# Names of the matrices in lower case, as parameters or modules: in loralib, LitGPT, PEFT and torchtune; in kohya-ss.
MATRICES = (("lora_a", "lora_b"), ("lora_down", "lora_up"))


def foreign_adapter(module: nn.Module) -> str | None:
    """What a module is, if it is an adapter of another library; None if it is none."""
    kind = f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    if peft is not None and isinstance(module, peft.BaseTunerLayer):
        return f"{kind}, a layer with a PEFT adapter"
    peft = sys.modules.get("peft.peft_model")
    if peft is not None and isinstance(module, peft.PeftModel):
        return f"{kind}, a model with a PEFT adapter"
    held = {name.lower() for name in (*module._parameters, *module._modules)}
    if not isinstance(module, LoRALayer) and any(a in held and b in held for a, b in MATRICES):
        return f"{kind}, a layer with LoRA matrices of its own"
    return None
