"""A snapshot: what modules were before they are changed, and are again if an error or an interrupt ends it early.

    with snapshot(modules) as keep:
        ...           # any statement may raise
        keep(part)    # this part is done: from here on it stays as it is now

It has no copies of values. What is cast within it has its memory twice until the end.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lightning_qlora.dtypes.instance_method import METHODS
from lightning_qlora.tensors.values import is_whole

CONTAINERS = tuple(key for key, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))


@contextmanager
def snapshot(modules: Iterable[nn.Module]) -> Iterator[Callable[[nn.Module], None]]:
    states = {part: _State(part) for part in modules}

    def keep(part: nn.Module) -> None:
        states[part] = _State(part)

    try:
        yield keep
    except BaseException:
        for state in states.values():
            state.restore()
        raise
    finally:
        states.clear()


class _State:
    def __init__(self, part: nn.Module) -> None:
        self._part = part
        self._class = type(part)
        attributes = vars(part)
        containers = [attributes[key] for key in CONTAINERS if isinstance(attributes.get(key), (dict, set))]
        containers += [vars(method) for method in attributes.get(METHODS, ())]
        containers += [value for key, value in attributes.items() if key.startswith("_qlora") and type(value) is dict]
        own = [*part._parameters.values(), *part._buffers.values()]
        tensors = [tensor for tensor in own if tensor is not None]
        containers += map(vars, tensors)
        # They stay the same objects, which handles of hooks refer to.
        self._contents = [(each, each.copy()) for each in (attributes, *containers)]
        self._values = [(tensor, tensor.requires_grad, tensor.data, tensor.grad) for tensor in tensors]

    def restore(self) -> None:
        if type(self._part) is not self._class:
            self._part.__class__ = self._class
        for container, content in self._contents:
            container.clear()
            container.update(content)
        for tensor, requires_grad, data, grad in self._values:
            if is_whole(tensor):  # else nothing replaced its values
                tensor.grad = None
                tensor.data = data
                tensor.grad = grad
            if tensor.requires_grad is not requires_grad:
                tensor.requires_grad_(requires_grad)
