"""PagedState: an `optimizer.state` that pages every tensor the moment it is put in.

An optimizer makes its state at the first step, one `state["exp_avg"] = torch.zeros_like(param)` after the other. Paging
it right there needs no knowledge of the optimizer, and no more than one tensor is ever in device memory by itself.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class Pages(Protocol):
    """What pages a value: `pages.OptimizerPages`."""

    def page(self, param: Any, value: Any) -> None:
        """Page every tensor in `value`, in place."""


class PagedState(defaultdict[Any, Any]):
    """The state of one optimizer: parameter -> `ParamState`. A copy or a pickle of it is a plain defaultdict."""

    def __init__(self, pages: Pages, state: Mapping[Any, Any]) -> None:
        super().__init__(dict)
        self.pages = pages
        for param, value in state.items():
            self[param] = value

    def __missing__(self, param: Any) -> "ParamState":
        self[param] = {}
        value: ParamState = self[param]
        return value

    def __setitem__(self, param: Any, value: Any) -> None:
        if type(value) is dict:
            value = ParamState(self.pages, param, value)
        else:
            self.pages.page(param, value)
        super().__setitem__(param, value)

    def __reduce__(self) -> Any:
        return defaultdict, (dict, dict(self.plain()))

    def __copy__(self) -> Any:
        return self.plain()

    def plain(self) -> defaultdict[Any, Any]:
        """The same entries as torch's optimizers keep them."""
        return defaultdict(dict, {p: dict(v) if isinstance(v, ParamState) else v for p, v in self.items()})


class ParamState(dict[Any, Any]):
    """The state of one parameter: name -> value. A copy or a pickle of it is a plain dict."""

    def __init__(self, pages: Pages, param: Any, values: Mapping[Any, Any]) -> None:
        super().__init__()
        self._pages = pages
        self._param = param
        self.update(values)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key != "step":  # the step counter stays where the optimizer wants it (pytorch issue 74424)
            self._pages.page(self._param, value)
        super().__setitem__(key, value)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """As dict.setdefault."""
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As dict.update."""
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def __ior__(self, other: Any) -> "ParamState":  # type: ignore[misc]
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The plain tensors a state value is made of.

    Those in containers, the local part of a DTensor, the inner ones of any other tensor subclass. Parameters are not
    state.
    """
    if type(value) is Tensor:
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__tensor_flatten__") and not isinstance(value, torch.nn.Parameter):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(value, name))
