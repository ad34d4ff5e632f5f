"""LoRA+: lora_B learns faster than lora_A (Hayou, Ghosh and Yu 2024)."""

from typing import Any

from torch import nn

from lightning_qlora.checks import check_converted
from lightning_qlora.layers.names import last_part


def loraplus_groups(module: nn.Module, lr: float, loraplus_lr_ratio: float = 16.0) -> list[dict[str, Any]]:
    """Two parameter groups for any optimizer: `AdamW(loraplus_groups(self, lr=1e-4))` in configure_optimizers.

    Args:
        module: A converted module.
        lr: Learning rate of lora_A and of all other parameters that train.
        loraplus_lr_ratio: The learning rate of lora_B is this times lr; the paper recommends 16.

    Returns:
        Two groups, with `params` and `lr`: all that trains but lora_B, then lora_B.

    Raises:
        ValueError: If the module has no adapter, or a number is not above 0.

    Example:
        ```python
        import torch
        from lightning_qlora import convert, loraplus_groups
        from torch import nn

        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        convert(model, r=4)
        optimizer = torch.optim.AdamW(loraplus_groups(model, lr=1e-4))
        ```
    """
    for name, value in (("lr", lr), ("loraplus_lr_ratio", loraplus_lr_ratio)):
        if not value > 0:
            raise ValueError(f"{name}={value!r}: must be above 0.")
    trained = [(last_part(name), p) for name, p in module.named_parameters() if p.requires_grad]
    fast = [p for name, p in trained if name == "lora_B"]
    check_converted(module, fast)
    slow = [p for name, p in trained if name != "lora_B"]
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * loraplus_lr_ratio}]
