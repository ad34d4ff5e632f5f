"""Run a module once more without an effect: buffers, metrics, counters, inputs and random generators are restored.

The module itself runs, not a copy of it: forward hooks and replaced forward methods are often closures over the module,
so they would change the original (a batch norm counts twice) or miss what the copy has (a list of features is empty).
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from io import IOBase
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.distributed._composable_state import _State as FSDPState
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.lightning_copies import classes
from lightning_qlora.training.rng_state import collect_rng_states, set_rng_states

T = TypeVar("T")
Restore = Callable[[], Any]

# Not saved: what can't change, what a forward pass does not change, and what is too large to copy.
NOT_SAVED = (
    int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type, ModuleType, FunctionType,
    Dataset, DataLoader, Optimizer, nn.Parameter, QLoRALinear, np.memmap, FSDPState,
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
    """Save the values and everything they contain, and restore them in place on exit."""
    rest, seen = [*values], set[int]()
    not_saved: tuple[type, ...] = (*NOT_SAVED, *(copy for kind in OF_LIGHTNING for copy in classes(kind)))
    with ExitStack() as stack:
        while rest:
            value = rest.pop()
            if id(value) not in seen and not isinstance(value, not_saved):
                seen.add(id(value))
                restore, parts = _save(value)
                rest.extend(parts)
                if restore is not None:
                    stack.callback(restore)
        yield


def _save(value: Any) -> tuple[Restore | None, Iterable[Any]]:
    """The function that restores one value in place, None if nothing can be restored, and what the value contains."""
    if isinstance(value, Tensor):
        return _save_tensor(value), ()
    if isinstance(value, np.ndarray):
        return partial(value.__setitem__, ..., value.copy()) if value.flags.writeable else None, ()
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state()), ()
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate()), ()
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state(legacy=False)), ()
    if isinstance(value, np.random.Generator):
        bits, before = value.bit_generator, value.bit_generator.state
        return lambda: setattr(bits, "state", before), ()
    if isinstance(value, MutableMapping):
        return partial(_refill, value, dict(value)), [*value.values()]
    if isinstance(value, (list, deque, set)):
        return partial(_refill, value, [*value]), [*value]
    if isinstance(value, (tuple, frozenset)):
        return None, value
    return _save_object(value)


def _save_object(value: Any) -> tuple[Restore | None, Iterable[Any]]:
    """The same for an object: its attributes, which are in its dict or its slots."""
    declared = (vars(kind).get("__slots__", ()) for kind in type(value).__mro__)
    names = {name for names in declared for name in ([names] if isinstance(names, str) else names)}
    slots = {name: getattr(value, name) for name in names - {"__dict__", "__weakref__"} if hasattr(value, name)}
    attributes = getattr(value, "__dict__", {})
    if any(isinstance(part, SHARED_WITH_THREADS) for part in (*slots.values(), *attributes.values())):
        return None, ()

    def restore() -> None:
        for name, part in slots.items():
            if getattr(value, name, None) is not part:
                object.__setattr__(value, name, part)

    return restore, [*slots.values(), attributes]


def _refill(container: Any, content: Any) -> None:
    before, now = ([*x, *x.values()] if isinstance(x, MutableMapping) else [*x] for x in (content, container))
    if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _save_tensor(value: Tensor) -> Restore | None:
    if value.is_inference() or value.is_nested or value.is_meta:
        return None
    copy, dense = value.detach().clone(), value.layout is torch.strided

    def restore() -> None:
        # Compared by value, not by version: torch's batch norm updates its running statistics without a new version.
        if not (dense and value.shape == copy.shape and torch.equal(value, copy)):
            with torch.no_grad():
                if dense and value.shape != copy.shape:
                    value.resize_(copy.shape)
                value.copy_(copy)

    return restore
