"""Adapters of other libraries in a module before conversion: they would be frozen, or trained beside ours."""

import sys

from torch import nn

from lightning_qlora.layers.lora_layer import LoRALayer

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
