"""disable_adapter: a module that computes without its adapters, as in PEFT.

Each layer counts the contexts that it is in. What runs later than it was called (a checkpointed block in the backward
pass, deferred logits) does so in the contexts of the call: `contexts()` and `restored(contexts)`.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import nn

from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.lora_layer import DISABLED, LoRALayer
from lightning_qlora.layers.trainable_tokens import TokenAdapter

INITIAL = "_qlora_initial"  # attribute of a module that trains in full: its initial parameters by name, if kept

_active: list["_Context"] = []  # in the order in which they began
_lock = RLock()  # for the list and the counts


@contextmanager
def disable_adapter(module: nn.Module) -> Iterator[None]:
    """Within this context a module computes as its 4-bit base does: y = x W^T + bias, also with dropout and DoRA.

    The reference model of DPO, or a comparison before and after training, without a second model. Parameters that train
    in full have their initial values if they were kept (`keep_initial=True` at conversion), else their trained ones. A
    block that gradient checkpointing recomputes, and logits that are deferred, are computed as they were called,
    inside the context or outside. `layer.weight` is W alone. The context belongs to the module: other threads that run
    it compute without adapters too, and a copy that is made inside keeps none.

    Args:
        module: A converted module, a part of one, or a wrapper of one (DDP, Fabric, torch.compile).

    Raises:
        ValueError: If no layer in it is converted, or an adapter began as PiSSA: its base is not the pretrained model.
        RuntimeError: If initial values were kept and the parameters are sharded (FSDP2).
    """
    context = _Context(module)
    _switch([], [context])
    try:
        yield
    finally:
        _switch([context], [])


class _Context:
    """One call of `disable_adapter`: the layers without adapter, and the modules with initial parameters."""

    def __init__(self, module: nn.Module) -> None:
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
        owners = [part for part in module.modules() if INITIAL in vars(part)]
        tokens = [part for part in module.modules() if isinstance(part, TokenAdapter)]
        self.parts: list[nn.Module] = [*layers, *tokens, *owners]
        for owner in owners:
            for name in vars(owner)[INITIAL]:
                if is_sharded(owner._parameters[name]):
                    raise RuntimeError(
                        f"disable_adapter: {name} of {type(owner).__name__} trains in full and is sharded (FSDP2), so "
                        "it can't have its initial values. Pass keep_initial=False."
                    )
        known = {id(p) for part in self.parts for p in part._parameters.values()}
        names = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in known]
        if names:
            warnings.warn(
                f"disable_adapter: {len(names)} parameters train in full and have their trained values in it: "
                f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}. For their initial values pass "
                "keep_initial=True at conversion.",
                stacklevel=4,
            )


def keep_initial(module: nn.Module) -> None:
    """Keep a copy of the parameters that train in full, for `disable_adapter`; called by the conversion."""
    kept: dict[int, nn.Parameter] = {}  # by id, so that tied parameters stay tied
    for part in module.modules():
        if isinstance(part, (LoRALayer, TokenAdapter)) or INITIAL in vars(part):
            continue
        own = part.named_parameters(recurse=False)
        trained = {key: p for key, p in own if p.requires_grad}
        for p in trained.values():
            kept.setdefault(id(p), nn.Parameter(p.detach().clone(), requires_grad=False))
        if trained:
            vars(part)[INITIAL] = {key: kept[id(p)] for key, p in trained.items()}


def contexts() -> tuple[_Context, ...]:
    """The contexts that have begun and not ended."""
    return tuple(_active)


@contextmanager
def restored(then: Sequence[_Context]) -> Iterator[None]:
    """Within this context the contexts are those that `contexts()` returned at another time."""
    now = contexts()
    begun, ended = [c for c in now if c not in then], [c for c in then if c not in now]
    _switch(begun, ended)
    try:
        yield
    finally:
        _switch(ended, begun)


def as_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs later in the contexts of now."""
    return restored(contexts())(function)


def _switch(ends: Iterable[_Context], begins: Iterable[_Context]) -> None:
    with _lock:
        for context, change in [*((context, -1) for context in ends), *((context, 1) for context in begins)]:
            (_active.append if change > 0 else _active.remove)(context)
            for part in context.parts:
                own = vars(part)
                before = own.pop(DISABLED, 0)
                if before + change > 0:  # without it the attribute is absent, which torch.compile guards on
                    own[DISABLED] = before + change
                if INITIAL in own and 0 in (before, before + change):
                    _exchange(part, own[INITIAL])


def _exchange(owner: nn.Module, others: dict[str, Any]) -> None:
    """Exchange parameters; an operation that autograd recorded keeps the one that it used."""
    for name, other in others.items():
        held: Any = owner._parameters[name]
        if other.device != held.device or other.dtype != held.dtype:
            with torch.no_grad():
                other.data = other.data.to(held.device, held.dtype)  # the module moved since
        owner._parameters[name], others[name] = other, held
