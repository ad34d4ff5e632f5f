"""Readable: a tensor without memory, whose values are computed when a function reads them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# What tells the properties of a tensor without its values.
PROPERTIES = ["dtype", "device", "shape", "ndim", "layout"]
PROPERTIES += ["requires_grad", "is_leaf", "grad_fn", "grad", "retains_grad"]
PROPERTIES += ["is_cuda", "is_meta", "is_sparse", "is_nested", "is_quantized"]
METADATA = {getattr(Tensor, name).__get__ for name in PROPERTIES}
METADATA |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size}
METADATA |= {Tensor.__len__, torch.is_floating_point, torch.is_complex, torch.numel}


class Readable(Tensor):
    _is_detached = False  # whether its values are read without a gradient

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def values(self) -> Tensor:
        """A plain tensor of this shape, differentiable."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """For code that torch calls below `__torch_function__`: values without a gradient."""
        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return plain(self).detach().clone()  # type: ignore[no-any-return]

    def numpy(self, **options: bool) -> Any:
        return plain(self).detach().numpy(**options)


def plain(value: Any) -> Any:
    """The values of a readable tensor; anything else as it is."""
    if not isinstance(value, Readable):
        return value
    values = value.values()
    if value._is_detached:
        return values.detach()
    return values


def writes(func: Any) -> bool:
    """Whether a function of torch works in place (`masked_fill_`, `__imul__`, `data.__set__`) or registers a hook."""
    name: str = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name in ("__set__", "__setitem__") or (name.startswith("__i") and name not in READ_BY)
    return name.endswith("_") or name.startswith("register_")


READ_BY = ("__iter__", "__invert__", "__int__", "__index__")
