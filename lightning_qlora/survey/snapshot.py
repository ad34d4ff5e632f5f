"""Snapshot: what a module was before it is changed, and is again if an error or an interrupt ends the change early.

    with Snapshot(modules) as before:
        ...                 # any statement may raise
        before.keep(part)   # this part is done: from here on it stays as it is now

It has no copies of values. What is cast within it has its memory twice until the end.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_qlora.dtypes.instance_method import METHODS
from lightning_qlora.layers.names import tensors_of
from lightning_qlora.tensors.dtensor import is_sharded
from lightning_qlora.tensors.values import is_strided

CONTAINERS = tuple(key for key, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))


class Snapshot:
    """The modules as they were; an error within the context gives them back their state."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._states = {part: _State(part) for part in modules}

    def keep(self, part: nn.Module) -> None:
        self._states[part] = _State(part)

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None:
            for state in self._states.values():
                state.restore()
        self._states.clear()


class _State:
    def __init__(self, part: nn.Module) -> None:
        self._part = part
        self._class = type(part)
        self._attributes = _Content(vars(part))
        containers = [vars(part)[key] for key in CONTAINERS if isinstance(vars(part).get(key), (dict, set))]
        containers += [vars(method) for method in vars(part).get(METHODS, ())]
        containers += [value for key, value in vars(part).items() if key.startswith("_qlora") and type(value) is dict]
        self._containers = list(map(_Content, containers))
        self._tensors = [_Tensor(tensor) for _, tensor in tensors_of([("", part)])]

    def restore(self) -> None:
        if type(self._part) is not self._class:
            self._part.__class__ = self._class
        for content in (self._attributes, *self._containers):
            content.restore()
        for tensor in self._tensors:
            tensor.restore()


class _Content:
    """What a dict or set holds; it stays the same object, which handles of hooks refer to."""

    def __init__(self, container: Any) -> None:
        self._container = container
        self._content = container.copy()

    def restore(self) -> None:
        self._container.clear()
        self._container.update(self._content)


class _Tensor:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._requires_grad = tensor.requires_grad
        self._attributes = _Content(vars(tensor))
        self._data = None
        self._grad = None
        if is_strided(tensor) and not is_sharded(tensor):  # else nothing replaces its values
            self._data = tensor.data
            self._grad = tensor.grad

    def restore(self) -> None:
        tensor = self._tensor
        if self._data is not None:
            tensor.grad = None
            tensor.data = self._data
            tensor.grad = self._grad
        if tensor.requires_grad is not self._requires_grad:
            tensor.requires_grad_(self._requires_grad)
        self._attributes.restore()
