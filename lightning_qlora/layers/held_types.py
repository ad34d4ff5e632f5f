"""Modules in 16 bits that a device computes faster, or more exactly, in fp32: held in fp32 while they are on it.

    parameters, buffers             cast to fp32 at conversion, one after another
    4-bit layers                    decode to fp32; `layer.weight.dtype` is fp32
    16-bit inputs of a module       cast to fp32
    state dicts                     the type of before, for values that it holds exactly
    `.to` another kind of device    the type of before, unless that device computes in fp32 too

`reason_for_fp32` says which devices these are. What trains in full is held in fp32 on every device, and `hold_in_fp32`
holds a whole module (`full_precision.py`).
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.kernels.cpu.products import products
from lightning_qlora.layers.dtensor import is_sharded

IN_16_BITS = (torch.bfloat16, torch.float16)
EVERYWHERE = "every device"


def reason_for_fp32(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a device should hold a module of this type in fp32, and compute in it; None: the module keeps its type.

    The reason is a sentence without its end. The first question for a type of a CPU measures, in some milliseconds.
    """
    if dtype not in IN_16_BITS:
        return None
    if device.type == "cpu":
        measured = products(dtype)
        if measured.is_slow:
            return f"on this CPU {measured} ({str(dtype).removeprefix('torch.')})"
    if device.type == "cuda" and not has_bf16("cuda"):
        return f"{torch.cuda.get_device_name(device)} has no bf16, and 4-bit layers multiply in fp16 with sums in fp32"
    if device.type in ("cuda", "xpu") and dtype is torch.float16:
        return "fp16 has no number for large activations and small gradients"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a question to the driver can't be traced
def has_bf16(device: str) -> bool:
    """Whether GPUs of a type compute in bf16. Cards before Ampere (V100, T4, RTX 20) emulate it, slower than fp32."""
    return device == "xpu" or (device == "cuda" and _cuda_has_bf16())


@cache
def _cuda_has_bf16() -> bool:
    if torch.version.hip:  # torch says yes for all; GCN before MI100 and RDNA before its third generation have none
        card = str(torch.cuda.get_device_properties(torch.cuda.current_device()).gcnArchName)
        return not card.startswith(("gfx900", "gfx902", "gfx904", "gfx906", "gfx909", "gfx90c", "gfx10"))
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


class HeldTypes:
    """What classes derive from whose instances can be held in fp32.

    Attributes:
        held_types: Key of each parameter and buffer that is held in fp32 -> its type before; "weight" of a 4-bit layer,
            and "forward" for a forward pass under autocast, are such keys without a tensor.
        held_on: The kind of device for which it was held ("cpu"), or EVERYWHERE; None: it is not held. On another one
            that is slow too it stays so.
    """

    held_types: Mapping[str, torch.dtype] = MappingProxyType({})
    held_on: str | None = None

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The type of the output without autocast; None: that of a module that is not held."""
        return None if self.held_on is None else torch.float32

    def set_held(self, types: Mapping[str, torch.dtype], device: str) -> None:
        """Record the types of before of what is held in fp32 on a kind of device."""
        self.held_types = {**self.held_types, **types}
        self.held_on = device

    def held_tensors(self) -> Iterator[tuple[str, Any, torch.dtype]]:
        """Key, value and type before of each parameter and buffer that is held."""
        tensors = vars(self)["_buffers"] | vars(self)["_parameters"]
        for key, dtype in self.held_types.items():
            if tensors.get(key) is not None:
                yield key, tensors[key], dtype

    def restore_types(self) -> None:
        """Give the values the type of before."""
        for _, tensor, dtype in self.held_tensors():
            if tensor.dtype is torch.float32:
                cast_in_place(tensor, dtype)
        for name in ("held_types", "held_on"):
            vars(self).pop(name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in nn.Module; a cast also casts the types of before. It, or another device, may release the module."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self.held_on is None:
            return self
        self.held_types = {key: type_after(fn, dtype) for key, dtype in self.held_types.items()}
        is_everywhere = self.held_on == EVERYWHERE
        applied = fn(torch.empty(0, dtype=torch.float32, device="cpu" if is_everywhere else self.held_on))
        moves = not is_everywhere and applied.device.type != self.held_on
        is_slow = not moves or any(reason_for_fp32(applied.device, dtype) for dtype in self.held_types.values())
        if applied.dtype is not torch.float32 or not is_slow:
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


def type_after(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> torch.dtype:
    """The type of a tensor after the function of `nn.Module._apply`, which may cast."""
    return fn(torch.empty(0, dtype=dtype, device="cpu")).dtype


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


def held_bytes(module: nn.Module) -> int:
    """How many bytes more a module takes, because it is held in fp32; shared tensors count once."""
    held: dict[Tensor, torch.dtype] = {}
    for part in module.modules():
        if isinstance(part, HeldTypes):
            held |= {tensor: dtype for _, tensor, dtype in part.held_tensors()}
    return sum(tensor.numel() * (tensor.itemsize - dtype.itemsize) for tensor, dtype in held.items())
