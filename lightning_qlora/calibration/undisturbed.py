"""Run a module once more and leave no trace: buffers, metrics, counters, arguments and random numbers as before."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn

from lightning_qlora.linear import QLoRALinear


@contextmanager
def undisturbed(module: nn.Module, *arguments: Any) -> Iterator[None]:
    """Put back, afterwards, all that a forward pass of the module can change but its parameters.

    That is what the module and its submodules hold as attributes (buffers among them: tensors, numbers, lists, dicts
    and sets, nested), the arguments it is called with, and the generators of torch, numpy and Python.
    """
    seen: set[int] = set()
    layers = [layer for layer in module.modules() if not isinstance(layer, QLoRALinear)]
    put_back = _all(_keep(value, seen) for value in (*map(vars, layers), *arguments))
    generators = _collect_rng_states()
    try:
        yield
    finally:
        _set_rng_states(generators)
        put_back()


def _keep(value: Any, seen: set[int]) -> Callable[[], None]:
    """What puts a value back, in place, as it is now."""
    if id(value) in seen or isinstance(value, nn.Parameter):
        return _nothing
    seen.add(id(value))
    if isinstance(value, Tensor):
        return _keep_tensor(value)
    if isinstance(value, MutableMapping):
        return _keep_container(value, lambda: [*value, *value.values()], dict(value), seen)
    if isinstance(value, (list, deque, set)):
        return _keep_container(value, lambda: [*value], list(value), seen)
    if isinstance(value, tuple):
        return _all(_keep(item, seen) for item in value)
    return _nothing


def _keep_container(container: Any, parts: Callable[[], list[Any]], content: Any, seen: set[int]) -> Callable[[], None]:
    before = parts()
    put_back_parts = _all(_keep(part, seen) for part in before)

    def put_back() -> None:
        put_back_parts()
        now = parts()
        if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(content)

    return put_back


def _all(puts: Iterable[Callable[[], None]]) -> Callable[[], None]:
    every = list(puts)

    def put_back() -> None:
        for put in every:
            put()

    return put_back


def _keep_tensor(value: Tensor) -> Callable[[], None]:
    if value.is_inference():
        return _nothing
    copy = value.detach().clone()

    def put_back() -> None:
        # Not by version: torch's batch norm updates its running statistics without counting it.
        if not torch.equal(value, copy):
            with torch.no_grad():
                value.copy_(copy)

    return put_back


def _nothing() -> None:
    pass
