"""Modules in 16 bits that a device computes faster in fp32: held in fp32, while they are on such a device.

    parameters, buffers             cast to fp32 at conversion, one after another
    4-bit layers                    decode to fp32; `layer.weight.dtype` is fp32
    16-bit inputs of a module       cast to fp32
    state dicts                     the type of before, for values that it holds exactly
    `.to` another kind of device    the type of before, unless that device computes in fp32 too

`slow_types.py` says which devices these are. What trains in full is held in fp32 on every device (`full_precision.py`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.slow_types import IN_16_BITS, reason_for_fp32


class HeldTypes:
    """What classes derive from whose instances can be held in fp32.

    Attributes:
        held_types: Key of each parameter and buffer that is held in fp32 -> its type before.
        held_on: The kind of device on which it is held ("cpu"); None: it is not held.
        held_always: Whether it is held on every kind of device.
    """

    held_types: dict[str, torch.dtype]
    held_on: str | None = None
    held_always: bool = False

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The type of the output without autocast; None: that of a module that is not held."""
        return None if self.held_on is None else torch.float32

    def held_tensors(self) -> Iterator[tuple[str, Any, torch.dtype]]:
        """Key, value and type before of each parameter and buffer that is held."""
        attributes = vars(self)
        tensors = attributes["_buffers"] | attributes["_parameters"]
        for key, dtype in attributes.get("held_types", {}).items():
            if tensors.get(key) is not None:
                yield key, tensors[key], dtype

    def restore_types(self) -> None:
        """Give the values the type of before."""
        for _, tensor, dtype in self.held_tensors():
            if tensor.dtype is torch.float32:
                cast_in_place(tensor, dtype)
        for name in ("held_types", "held_on", "held_always"):
            vars(self).pop(name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in nn.Module; a cast also casts the types of before. It, or another device, may release the module."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self.held_on is None:
            return self
        types: dict[str, torch.dtype] = vars(self).setdefault("held_types", {})
        for key, dtype in types.items():
            types[key] = fn(torch.empty(0, dtype=dtype, device=self.held_on)).dtype
        applied = fn(torch.empty(0, dtype=torch.float32, device=self.held_on))
        is_cast = applied.dtype is not torch.float32
        moves = not self.held_always and applied.device.type != self.held_on
        if is_cast or (moves and not any(reason_for_fp32(applied.device, dtype) for dtype in types.values())):
            self.restore_types()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As in nn.Module, with the type of before where it holds a value exactly."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if keep_vars:
            return
        for key, tensor, dtype in self.held_tensors():
            value = destination.get(prefix + key)
            if value is None or is_sharded(value) or tensor.dtype is not torch.float32:
                continue
            narrow = value.to(dtype)
            if value.is_meta or torch.equal(narrow.float(), value):
                destination[prefix + key] = narrow

    def _load_from_state_dict(self, *args: Any) -> None:
        """As in nn.Module; with assign=True the values that were assigned are cast."""
        super()._load_from_state_dict(*args)  # type: ignore[misc]
        for tensor in self._tensors_in_fp32():
            if tensor.dtype in IN_16_BITS:
                cast_in_place(tensor, torch.float32)

    def _tensors_in_fp32(self) -> Iterator[Tensor]:
        for _, tensor, _ in self.held_tensors():
            yield tensor


def in_fp32(value: Any) -> Any:
    """A 16-bit tensor in fp32, also in a tuple or list; other values as they are."""
    return cast_values(value, lambda tensor: tensor.float() if tensor.dtype in IN_16_BITS else tensor)


def cast_values(value: Any, cast: Callable[[Tensor], Tensor]) -> Any:
    """A tensor after a cast, also in a tuple or list; one in which nothing changes, and other values, as they are.

    So a forward pass may append to a list of its caller.
    """
    if isinstance(value, Tensor):
        return cast(value)
    if type(value) in (tuple, list):
        values = [cast_values(each, cast) for each in value]
        if any(new is not old for new, old in zip(values, value, strict=True)):
            return type(value)(values)
    return value


def cast_in_place(tensor: Tensor, dtype: torch.dtype) -> None:
    """Cast a parameter or buffer, and its gradient if there is one, in place: it stays the same object."""
    grad = tensor.grad
    tensor.grad = None
    tensor.data = tensor.data.to(dtype)
    if grad is not None:
        tensor.grad = grad.to(dtype)


def release(module: nn.Module) -> None:
    """Give what is held in fp32 the type of before, in place."""
    for part in module.modules():
        if isinstance(part, HeldTypes):
            part.restore_types()
