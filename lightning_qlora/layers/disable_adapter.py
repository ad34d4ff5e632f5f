"""disable_adapter: a module without its adapters, for the time of a context."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch import nn

from lightning_qlora.checks import check_converted, first_of
from lightning_qlora.layers.with_adapter import DISABLED, WithAdapter

_lock = Lock()  # for the numbers of contexts


@contextmanager
def disable_adapter(module: nn.Module) -> Iterator[None]:
    """Within this context a module computes as its 4-bit base does: y = x W^T + bias, also with dropout and DoRA.

    The reference model of DPO, or a comparison before and after training, without a second model. Parameters that train
    in full keep their trained values. `layer.weight` is W alone. The context belongs to the module: other threads that
    run it compute without adapters too, and copies of it with them. Run the backward pass where the forward pass ran,
    inside or outside: gradient checkpointing computes its blocks again.

    Args:
        module: A converted module, a part of one, or a wrapper of one (DDP, Fabric, torch.compile).

    Raises:
        ValueError: If no layer in it is converted.

    Example:
        ```python
        import torch
        from lightning_qlora import convert, disable_adapter
        from torch import nn

        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        convert(model, r=4)
        with torch.no_grad(), disable_adapter(model):
            reference = model(torch.randn(8, 64))
        ```
    """
    parts = _parts(module)
    _count(parts, 1)
    try:
        yield
    finally:
        _count(parts, -1)


def _parts(module: nn.Module) -> list[WithAdapter]:
    parts = [part for part in module.modules() if isinstance(part, WithAdapter)]
    check_converted(module, parts)
    adapters = {id(p) for part in parts for p in part._parameters.values()}
    names = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in adapters]
    if names:
        warnings.warn(
            f"disable_adapter: {len(names)} parameters train in full and have their trained values in it: "
            f"{first_of(names, 4)}.",
            stacklevel=4,
        )
    return parts


def _count(parts: list[WithAdapter], change: int) -> None:
    with _lock:
        for part in parts:
            contexts = vars(part).pop(DISABLED, 0) + change
            if contexts > 0:
                vars(part)[DISABLED] = contexts
