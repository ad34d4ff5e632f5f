"""PagedState: an `optimizer.state` that pages every tensor as soon as it is set.

An optimizer makes its state in the first step, one `state["exp_avg"] = torch.zeros_like(param)` after the other. Paging
at the assignment works with any optimizer, and only one unpaged tensor is in device memory at a time.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class _ObservedDict(dict[Any, Any]):
    """A dict whose methods all read and write through `__getitem__` and `__setitem__`; dict's methods do not."""

    on_write: Callable[[Any, Any], None]  # called with a parameter and new state: pages the tensors in it
    on_read: Callable[[], None]  # called before a value is read: waits for copies to the host
    items = Mapping.items  # type: ignore[assignment]
    values = Mapping.values  # type: ignore[assignment]
    update = MutableMapping.update

    def __getitem__(self, key: Any) -> Any:
        self.on_read()
        return dict.__getitem__(self, key)  # which calls `__missing__`

    def __iter__(self) -> Iterator[Any]:
        """As in dict. `dict(state)` and `{**state}` copy without `__getitem__` from a class that does not have it."""
        return super().__iter__()

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __ior__(self, other: Any) -> "_ObservedDict":
        self.update(other)
        return self

    @override
    def pop(self, *key_and_default: Any) -> Any:
        self.on_read()
        return super().pop(*key_and_default)

    @override
    def popitem(self) -> tuple[Any, Any]:
        self.on_read()
        return super().popitem()

    @override
    def get(self, key: Any, default: Any = None) -> Any:
        self.on_read()
        return super().get(key, default)

    @override
    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]


class PagedState(_ObservedDict, defaultdict[Any, Any]):
    """The state of one optimizer: parameter -> `ParamState`. A copy or a pickle of it is a plain defaultdict."""

    def __init__(
        self, on_write: Callable[[Any, Any], None], on_read: Callable[[], None], state: Mapping[Any, Any]
    ) -> None:
        super().__init__(dict)
        self.on_write = on_write
        self.on_read = on_read
        self.update(state)

    def __missing__(self, param: Any) -> Any:
        self[param] = {}
        return self[param]

    def __setitem__(self, param: Any, value: Any) -> None:
        if type(value) is dict:
            value = ParamState(self, param, value)
        else:
            self.on_write(param, value)
        super().__setitem__(param, value)

    def __reduce__(self) -> Any:
        return defaultdict, (dict, dict(self.plain()))

    def __copy__(self) -> Any:
        return self.plain()

    @override
    def copy(self) -> Any:
        return self.plain()

    def plain(self) -> defaultdict[Any, Any]:
        """The same entries in the types that torch's optimizers use."""
        state = defaultdict(dict, self.items())
        for param, values in state.items():
            if isinstance(values, ParamState):
                state[param] = dict(values)
        return state


class ParamState(_ObservedDict):
    """The state of one parameter, by names. A copy or a pickle of it is a plain dict."""

    def __init__(self, state: PagedState, param: Any, values: Mapping[Any, Any]) -> None:
        self.on_write = state.on_write
        self.on_read = state.on_read
        self._param = param
        self.update(values)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key != "step":  # optimizers choose the device of the step counter (pytorch issue 74424)
            self.on_write(self._param, value)
        super().__setitem__(key, value)

    def __reduce__(self) -> Any:
        return dict, (self.copy(),)

    @override
    def copy(self) -> dict[Any, Any]:
        return dict(self)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors in a state value: in containers, in DTensors (the local part), in tensor subclasses.

    Parameters are not state and are skipped.
    """
    if type(value) is Tensor:
        yield value
    elif isinstance(value, Mapping):
        # Of the dicts above without their hook: nothing reads the values.
        items = dict.values(value) if isinstance(value, dict) else value.values()
        for item in items:
            if type(item) is Tensor:
                yield item
            else:
                yield from tensors_in(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__tensor_flatten__") and not isinstance(value, torch.nn.Parameter):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(value, name))
