"""disable_adapter: a module that computes without its adapters, as in PEFT. Each layer counts its contexts."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn

from lightning_qlora.layers.lora_layer import DISABLED, LoRALayer
from lightning_qlora.layers.trainable_tokens import TokenAdapter

_lock = Lock()  # for the counts


@contextmanager
def disable_adapter(module: nn.Module) -> Iterator[None]:
    """Within this context a module computes as its 4-bit base does: y = x W^T + bias, also with dropout and DoRA.

    The reference model of DPO, or a comparison before and after training, without a second model. Parameters that train
    in full keep their trained values. `layer.weight` is W alone. The context belongs to the module: other threads that
    run it compute without adapters too. Run the backward pass where the forward pass ran, inside or outside: gradient
    checkpointing computes its blocks again.

    Args:
        module: A converted module, a part of one, or a wrapper of one (DDP, Fabric, torch.compile).

    Raises:
        ValueError: If no layer in it is converted, or an adapter began as PiSSA: its base is not the pretrained model.
    """
    parts = _parts(module)
    _count(parts, 1)
    try:
        yield
    finally:
        _count(parts, -1)


def _parts(module: nn.Module) -> list[nn.Module]:
    """The layers, and rows of tokens, that have an adapter; warns of what trains without one."""
    layers = [part for part in module.modules() if isinstance(part, LoRALayer)]
    if not layers:
        raise ValueError(
            f"disable_adapter: {type(module).__name__} has no converted layer, so there is no adapter to disable. "
            "Call convert(module) first, or let the Trainer do so."
        )
    pissa = next((layer for layer in layers if layer.config.initialization == "pissa"), None)
    if pissa is not None:
        raise ValueError(
            f"disable_adapter: {pissa.full_name} was initialized with PiSSA, which moves the largest part of the "
            "weight into the adapter, so the base without it is not the pretrained model. Use another "
            "init_lora_weights."
        )
    parts = [*layers, *(part for part in module.modules() if isinstance(part, TokenAdapter))]
    known = {id(p) for part in parts for p in part._parameters.values()}
    names = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in known]
    if names:
        warnings.warn(
            f"disable_adapter: {len(names)} parameters train in full and have their trained values in it: "
            f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}.",
            stacklevel=4,
        )
    return parts


def _count(parts: list[nn.Module], change: int) -> None:
    with _lock:
        for part in parts:
            contexts = vars(part).pop(DISABLED, 0) + change
            if contexts > 0:  # without it the attribute is absent, which torch.compile guards on
                vars(part)[DISABLED] = contexts
