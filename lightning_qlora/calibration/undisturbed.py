"""Run a module once more and leave no trace: buffers, metrics, counters, arguments and random numbers as before."""

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

from lightning_qlora.linear import QLoRALinear
from lightning_qlora.random_state import generators, set_generators

T = TypeVar("T")
PutBack = Callable[[], None]

# What can't change, what a forward pass has no business with, and what is too large to keep a copy of.
LEFT_ALONE = (
    int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type, ModuleType, FunctionType,
    Trainer, Fabric, Logger, Callback, LightningDataModule, Dataset, DataLoader, Optimizer,
    nn.Parameter, QLoRALinear, np.memmap,
)  # fmt: skip
# An object that holds one of these may be at work while we look, so its attributes are not ours to put back.
AT_WORK = (threading.Thread, type(threading.Lock()), type(threading.RLock()), threading.Condition, IOBase)


@contextmanager
def undisturbed(module: nn.Module, *arguments: Any) -> Iterator[None]:
    """Put back, afterwards, all that a forward pass of the module can change but its parameters.

    That is what the module and its submodules hold as attributes and the arguments it is called with (tensors, arrays,
    numbers, generators, lists, dicts and sets, and objects of these, nested), and the generators of torch, numpy and
    Python. An iterator can't be put back.
    """
    layers = [layer for layer in module.modules() if not isinstance(layer, QLoRALinear)]
    before = generators()
    try:
        with _kept(*map(vars, layers), *arguments):
            yield
    finally:
        set_generators(before)


def map_kept(values: Iterable[T]) -> Iterator[T]:
    """The same values, each put back as it was when the next one is asked for."""
    for value in values:
        with _kept(value):
            yield value


@contextmanager
def _kept(*values: Any) -> Iterator[None]:
    put_back = _keep_all([*values])
    try:
        yield
    finally:
        for put in put_back:
            put()


def _keep_all(values: list[Any]) -> list[PutBack]:
    """What puts values back, in place, as they are now, and all that they are made of."""
    seen: set[int] = set()
    puts: list[PutBack] = []
    while values:
        value = values.pop()
        if id(value) in seen or isinstance(value, LEFT_ALONE):
            continue
        seen.add(id(value))
        put, parts = _keep(value)
        puts.append(put)
        values.extend(parts)
    return puts


def _keep(value: Any) -> tuple[PutBack, list[Any]]:
    """What puts back one value, and its parts."""
    if isinstance(value, Tensor):
        return _keep_tensor(value), []
    if isinstance(value, np.ndarray):
        return _keep_array(value), []
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
        return _keep_container(value, lambda: [*value, *value.values()], dict(value)), [*value.values()]
    if isinstance(value, (list, deque, set)):
        return _keep_container(value, lambda: [*value], list(value)), [*value]
    if isinstance(value, (tuple, frozenset)):
        return _nothing, [*value]
    return _keep_object(value)


def _keep_object(value: Any) -> tuple[PutBack, list[Any]]:
    """Its attributes, which stand in a dict or in slots."""
    slots = {name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))}
    held = {name: getattr(value, name) for name in slots - {"__dict__", "__weakref__"} if hasattr(value, name)}
    attributes = getattr(value, "__dict__", None)
    if any(isinstance(part, AT_WORK) for part in (*held.values(), *(attributes or {}).values())):
        return _nothing, []

    def put_back() -> None:
        for name, part in held.items():
            if getattr(value, name, None) is not part:
                object.__setattr__(value, name, part)

    return put_back, [*held.values(), *([attributes] if isinstance(attributes, dict) else [])]


def _keep_container(container: Any, parts: Callable[[], list[Any]], content: Any) -> PutBack:
    before = parts()

    def put_back() -> None:
        now = parts()
        if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(content)

    return put_back


def _keep_tensor(value: Tensor) -> PutBack:
    if value.is_inference() or value.is_nested or value.is_meta:
        return _nothing
    copy, dense = value.detach().clone(), value.layout is torch.strided

    def put_back() -> None:
        # Not by version: torch's batch norm updates its running statistics without counting it.
        if not (dense and value.shape == copy.shape and torch.equal(value, copy)):
            with torch.no_grad():
                if dense and value.shape != copy.shape:
                    value.resize_(copy.shape)
                value.copy_(copy)

    return put_back


def _keep_array(value: np.ndarray[Any, Any]) -> PutBack:
    copy = value.copy()

    def put_back() -> None:
        if value.flags.writeable:
            value[...] = copy

    return put_back


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _ignore(_: Any) -> None:
    pass


def _nothing() -> None:
    pass
