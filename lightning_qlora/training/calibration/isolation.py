"""Run a module once more without an effect: buffers, metrics, counters, inputs and random generators are restored."""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from io import IOBase
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.lightning_copies import classes
from lightning_qlora.training.rng_state import collect_rng_states, set_rng_states

T = TypeVar("T")
Restore = Callable[[], None]

# Not saved: what can't change, what a forward pass does not change, and what is too large to copy.
NOT_SAVED = (
    int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type, ModuleType, FunctionType,
    Dataset, DataLoader, Optimizer, nn.Parameter, QLoRALinear, np.memmap,
)  # fmt: skip
OF_LIGHTNING = (Trainer, Fabric, Logger, Callback, LightningDataModule)  # not saved either
# Another thread may change an object with one of these attributes meanwhile: restoring it would undo that change.
SHARED_WITH_THREADS = (threading.Thread, type(threading.Lock()), type(threading.RLock()), threading.Condition, IOBase)


@contextmanager
def isolated(module: nn.Module, *arguments: Any) -> Iterator[None]:
    """Restore on exit everything, except parameters, that a forward pass of the module can change.

    Restored are the attributes of the module and its submodules and the arguments of its call (tensors, arrays,
    numbers, generators, lists, dicts, sets and objects, nested), and the global generators of torch, numpy and Python.
    An iterator can't be restored.
    """
    layers = [layer for layer in module.modules() if not isinstance(layer, QLoRALinear)]
    rng_states = collect_rng_states()
    try:
        with _restored(*map(vars, layers), *arguments):
            yield
    finally:
        set_rng_states(rng_states)


def restore_each(values: Iterable[T]) -> Iterator[T]:
    """The same values; each is restored when the next one is taken."""
    for value in values:
        with _restored(value):
            yield value


@contextmanager
def _restored(*values: Any) -> Iterator[None]:
    restores = _save_all([*values])
    try:
        yield
    finally:
        for restore in restores:
            restore()


def _save_all(values: list[Any]) -> list[Restore]:
    """Save values and everything they contain; the functions that restore them in place."""
    seen: set[int] = set()
    not_saved: tuple[type, ...] = (*NOT_SAVED, *(copy for kind in OF_LIGHTNING for copy in classes(kind)))
    restores: list[Restore] = []
    while values:
        value = values.pop()
        if id(value) in seen or isinstance(value, not_saved):
            continue
        seen.add(id(value))
        restore, parts = _save(value)
        restores.append(restore)
        values.extend(parts)
    return restores


def _save(value: Any) -> tuple[Restore, list[Any]]:
    """The function that restores one value, and what the value contains."""
    if isinstance(value, Tensor):
        return _save_tensor(value), []
    if isinstance(value, np.ndarray):
        return _save_array(value), []
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda: _ignore(value.set_state(state)), []
    if isinstance(value, random.Random):
        version = value.getstate()
        return lambda: value.setstate(version), []
    if isinstance(value, (np.random.Generator, np.random.RandomState)):
        bits: Any = getattr(value, "bit_generator", None) or value._bit_generator  # type: ignore[union-attr]
        before = bits.state
        return lambda: setattr(bits, "state", before), []
    if isinstance(value, MutableMapping):
        return _save_container(value, lambda: [*value, *value.values()], dict(value)), [*value.values()]
    if isinstance(value, (list, deque, set)):
        return _save_container(value, lambda: [*value], list(value)), [*value]
    if isinstance(value, (tuple, frozenset)):
        return _nothing, [*value]
    return _save_object(value)


def _save_object(value: Any) -> tuple[Restore, list[Any]]:
    """The same for an object: its attributes, which are in its dict or its slots."""
    slots = {name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))}
    in_slots = {name: getattr(value, name) for name in slots - {"__dict__", "__weakref__"} if hasattr(value, name)}
    in_dict = getattr(value, "__dict__", None)
    if any(isinstance(part, SHARED_WITH_THREADS) for part in (*in_slots.values(), *(in_dict or {}).values())):
        return _nothing, []

    def restore() -> None:
        for name, part in in_slots.items():
            if getattr(value, name, None) is not part:
                object.__setattr__(value, name, part)

    return restore, [*in_slots.values(), *([in_dict] if isinstance(in_dict, dict) else [])]


def _save_container(container: Any, parts: Callable[[], list[Any]], content: Any) -> Restore:
    before = parts()

    def restore() -> None:
        now = parts()
        if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(content)

    return restore


def _save_tensor(value: Tensor) -> Restore:
    if value.is_inference() or value.is_nested or value.is_meta:
        return _nothing
    copy, dense = value.detach().clone(), value.layout is torch.strided

    def restore() -> None:
        # Compared by value, not by version: torch's batch norm updates its running statistics without a new version.
        if not (dense and value.shape == copy.shape and torch.equal(value, copy)):
            with torch.no_grad():
                if dense and value.shape != copy.shape:
                    value.resize_(copy.shape)
                value.copy_(copy)

    return restore


def _save_array(value: np.ndarray[Any, Any]) -> Restore:
    copy = value.copy()

    def restore() -> None:
        if value.flags.writeable:
            value[...] = copy

    return restore


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _ignore(_: Any) -> None:
    pass


def _nothing() -> None:
    pass
