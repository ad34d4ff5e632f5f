"""DecodedWeight: how `layer.weight` of a 4-bit layer can be read like any other weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

READ_ONLY = (
    "the weight of a QLoRALinear is read-only, since it is decoded from 4 bits at each use. "
    "To replace it call layer.quantize_weight(new_weight)."
)


class DecodedWeight(Tensor):
    """A weight that is decoded when an operation reads its values; nothing can be written to it.

    Other people's code asks `layer.weight.dtype` or `.device` in every forward pass: that must cost nothing.
    """

    _decode: Callable[[], Tensor]
    _is_hf_initialized = True  # transformers leaves what has this mark as it is when it initializes missing weights

    @staticmethod
    def __new__(
        cls, decode: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> "DecodedWeight":
        """A tensor of that shape, type and device whose values `decode` gives."""
        view: DecodedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        view._decode = decode
        return view

    def __init__(self, *_: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if isinstance(value, DecodedWeight) and argument.alias_info and argument.alias_info.is_write:
                raise RuntimeError(f"{func}: {READ_ONLY}")

        def decoded(value: Any) -> Any:
            return value._decode() if isinstance(value, DecodedWeight) else value

        return func(*tree_map(decoded, args), **tree_map(decoded, kwargs))

    @property
    def data(self) -> "DecodedWeight":
        """The same, since it has no gradient: what is written to it is refused, not lost."""
        return self

    @data.setter
    def data(self, _: Tensor) -> None:
        raise RuntimeError(f"weight.data = ...: {READ_ONLY}")

    def __setitem__(self, *_: Any) -> None:
        raise RuntimeError(f"weight[...] = ...: {READ_ONLY}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """The decoded weight, a dense tensor."""
        return self._decode().clone()

    def numpy(self, *, force: bool = False) -> Any:
        """The decoded weight as an array."""
        return self._decode().numpy(force=force)

    def tolist(self) -> Any:
        """The decoded weight as nested lists."""
        return self._decode().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DecodedWeight({self._decode()!r})"
