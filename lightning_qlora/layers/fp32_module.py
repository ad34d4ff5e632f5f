"""Hold a module in fp32 on a device that is slow in its 16 bits, or give it its types back: `compute_in_fast_type`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.full_precision import FullPrecision, can_derive, with_types
from lightning_qlora.layers.held_types import HeldTypes, cast_in_place, release
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.layers.slow_types import IN_16_BITS, reason_for_fp32

Decide = Callable[[torch.device, torch.dtype], str | None]  # `reason_for_fp32`, or what all ranks agree on
Reasons = dict[torch.dtype, str]


def compute_in_fast_type(
    module: nn.Module, device: torch.device | None, decide: Decide = reason_for_fp32, always: bool = False
) -> Reasons:
    """Hold a module in fp32 where its device should compute in fp32, in place; else give it its 16-bit types.

    Args:
        module: A converted module; what trains in full is in fp32 already.
        device: The device that it will be on; None: where it is.
        decide: Why a device holds a type in fp32; None: it does not.
        always: Whether it stays so on every other device, too.

    Returns:
        Each type that is held in fp32 -> the reason.
    """
    if device is None:
        device = _device_of(module)
    types = set(_types(module))
    reasons = {dtype: decide(device, dtype) for dtype in IN_16_BITS if dtype in types}
    if not all(reasons.values()):
        release(module)
    slow = {dtype: reason for dtype, reason in reasons.items() if reason}
    _hold(module, device, slow)
    for part in module.modules():
        if isinstance(part, HeldTypes) and part.held_on is not None:
            part.held_always = always
    return slow


def _types(module: nn.Module) -> Iterator[torch.dtype]:
    """The types of what a module computes with, before they were held in fp32."""
    for part in module.modules():
        for _, _, tensor in _own_tensors(part):
            yield tensor.dtype
        if isinstance(part, PackedLayer):
            yield part.weight_dtype
        if isinstance(part, FullPrecision) and part.autocast_dtype is not None:
            yield part.autocast_dtype
        yield from vars(part).get("held_types", {}).values()


def _own_tensors(part: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for key, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
        yield part, key, tensor


def _hold(module: nn.Module, device: torch.device, slow: Mapping[torch.dtype, Any]) -> None:
    """Cast the values of these types to fp32, one after another."""
    parts = list(module.modules())
    tensors = [(*each, each[2].dtype) for part in parts for each in _own_tensors(part)]  # before tied ones are cast
    for part, key, tensor, dtype in tensors:
        if dtype not in slow or is_sharded(tensor):
            continue
        if isinstance(part, HeldTypes) or can_derive(part):
            owner: Any = part
            if not isinstance(part, HeldTypes):
                owner = with_types(part)
            _set_held(owner, key, dtype, device)
        if tensor.dtype is dtype:
            cast_in_place(tensor, torch.float32)
    for each in parts:
        if isinstance(each, PackedLayer) and each.weight_dtype in slow:
            _set_held(each, "weight", each.weight_dtype, device)
            each.weight_dtype = torch.float32
        if isinstance(each, FullPrecision) and each.autocast_dtype in slow:
            each.held_on = device.type


def _set_held(part: HeldTypes, key: str, dtype: torch.dtype, device: torch.device) -> None:
    vars(part).setdefault("held_types", {})[key] = dtype
    part.held_on = device.type


def _device_of(module: nn.Module) -> torch.device:
    """The device of a module; of one that is on the meta device, the one that it will be loaded to."""
    for part in module.modules():
        tensors: Iterable[Tensor] = [tensor for _, _, tensor in _own_tensors(part)]
        if isinstance(part, PackedLayer):
            tensors = [part.packed]
        for tensor in tensors:
            if not tensor.is_meta:
                return tensor.device
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def held_bytes(module: nn.Module) -> int:
    """How many bytes more a module takes, because it is held in fp32; shared tensors count once."""
    tensors = {
        id(tensor): tensor.nbytes * (1 - dtype.itemsize / tensor.dtype.itemsize)
        for part in module.modules()
        if isinstance(part, HeldTypes)
        for _, tensor, dtype in part.held_tensors()
    }
    return int(sum(tensors.values()))


def held_type(part: nn.Module, key: str) -> torch.dtype | None:
    """The type of a parameter or buffer before it was held in fp32; None if it is not held."""
    types: dict[str, torch.dtype] = vars(part).get("held_types", {})
    return types.get(key)
