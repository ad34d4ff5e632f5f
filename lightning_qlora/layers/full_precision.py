"""Parameters held in fp32: what trains in full, computed in 16 bits by autocast; all of a module on a slow device.

    parameters of a module, in its forward pass and outside of it     fp32
    its buffers, such as the statistics of BatchNorm                  fp32, as torch takes them beside such parameters
    forward pass of the module that holds them                        under autocast(16-bit type), its output cast back
    forward pass and steps of the module that was converted           under the same autocast, its output as it is
    all of a module on a device that is slow in 16 bits               fp32, without autocast (`held_types.py`)

In 16 bits most steps of an optimizer are lost: a step of AdamW is about a learning rate, and that of 2e-4 is smaller
than half of the last bit of every bf16 value above 0.1. A parameter is what it says everywhere, so code may write to it
in a forward pass. The class of a module becomes a subclass of the same name. Around the converted module,
autocast lets code of other modules use such a parameter too: `F.linear(h, self.head.weight)` in a training step.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_qlora.config import ComputeDtype
from lightning_qlora.layers.derived import Derived, derive, restore
from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.held_types import (
    EVERYWHERE,
    IN_16_BITS,
    HeldTypes,
    cast_in_place,
    cast_values,
    in_fp32,
    reason_for_fp32,
    release,
    type_after,
)
from lightning_qlora.layers.names import join
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.lightning_copies import classes

Decide = Callable[[torch.device, torch.dtype], str | None]  # `reason_for_fp32`, or what all ranks agree on
REASON_OF_FP16 = "compute_dtype='fp16': 4-bit layers multiply in fp16 with sums in fp32"
STEPS = ("training_step", "validation_step", "test_step", "predict_step")
# torch has no product of two types for the first two, also under autocast, and a slow one for the third.
TAKES_FP32 = (nn.Bilinear, nn.EmbeddingBag, nn.RMSNorm)


class FullPrecision(HeldTypes, Derived):
    """A class whose forward pass, and steps of a LightningModule, compute under autocast.

    Attributes:
        types_before: Key of each parameter that trains in fp32, and buffer beside it -> the 16-bit type that it had.
        autocast_dtype: The type of the forward pass; None, or one that has not 16 bits: without autocast.
        casts_output: Whether the output of the forward pass is cast to that type.
    """

    types_before: Mapping[str, torch.dtype] = MappingProxyType({})
    autocast_dtype: torch.dtype | None = None
    casts_output: bool = False

    @classmethod
    def _derived_members(cls, before: type[Any]) -> dict[str, Any]:
        members: dict[str, Any] = {name: getattr(before, name) for name in ("__name__", "__qualname__", "__doc__")}
        for name in ("forward", *STEPS):
            method = getattr(before, name, None)
            inherited = [getattr(kind, name, None) for kind in (nn.Module, *classes(LightningModule))]
            if method is not None and method not in inherited:
                members[name] = _under_autocast(method, issubclass(before, TAKES_FP32))
        return members

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The type of the output without autocast; None: that of the module without this class."""
        if self.held_on is None and self.autocast_dtype in IN_16_BITS:
            return self.autocast_dtype
        return super().output_dtype

    def _tensors_in_fp32(self) -> Iterator[Tensor]:
        yield from super()._tensors_in_fp32()
        tensors = vars(self)["_buffers"] | vars(self)["_parameters"]
        yield from (tensors[key] for key in self.types_before if tensors.get(key) is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in nn.Module; a cast of the module casts what it computes in, too."""
        super()._apply(fn, recurse)
        self.types_before = {key: type_after(fn, dtype) for key, dtype in self.types_before.items()}
        if self.autocast_dtype is not None:
            self.autocast_dtype = type_after(fn, self.autocast_dtype)
        return self


def _under_autocast(method: Any, takes_fp32: bool) -> Callable[..., Any]:
    """A method of a class, under autocast."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = self.autocast_dtype
        if self.held_on is not None:
            if all(tensor.dtype is torch.float32 for _, tensor, _ in self.held_tensors()):  # FSDP may have cast them
                args = in_fp32(args)
                kwargs = {key: in_fp32(value) for key, value in kwargs.items()}
            return method(self, *args, **kwargs)
        if dtype not in IN_16_BITS:
            return method(self, *args, **kwargs)
        if takes_fp32:
            args = tuple(_cast_values(value, dtype, torch.float32) for value in args)
            kwargs = {key: _cast_values(value, dtype, torch.float32) for key, value in kwargs.items()}
        unfused = nullcontext() if torch.compiler.is_compiling() else _without_fused_layers()
        with _autocast(self, dtype), unfused:
            output = method(self, *args, **kwargs)
        if self.casts_output:
            return _cast_values(output, torch.float32, dtype)
        return output

    forward.__code__ = forward.__code__.replace()  # torch.compile keeps a limited number of graphs for a code object
    return wraps(method)(forward)


def _autocast(module: nn.Module, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast on the device of a module; without the cache of casts, so that each use sees the present value."""
    device = next(module.parameters()).device.type
    if device == "meta":
        return nullcontext()
    return torch.autocast(device, dtype, cache_enabled=False)


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """torch's fused encoder layers take weights of one type; they refuse autocast, but ask for that of CUDA alone."""
    is_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_enabled)


def _cast_values(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """A tensor of one type in another, also in a tuple or list; other values, and losses, as they are."""
    return cast_values(value, lambda tensor: tensor.to(after) if tensor.dtype is before and tensor.ndim else tensor)


def train_in_full_precision(module: nn.Module) -> None:
    """Hold the 16-bit parameters that train in full in fp32, in place.

    Three kinds of parameters still train in 16 bits: sharded ones, those of a ScriptModule, and those of a module whose
    `forward` was replaced.
    """
    trained: list[tuple[Any, str, nn.Parameter, torch.dtype]] = [
        (owner, key, parameter, parameter.dtype)
        for owner in module.modules()
        for key, parameter in owner.named_parameters(recurse=False)
        if parameter.requires_grad and parameter.dtype in IN_16_BITS
    ]
    parents = _parents(module)
    in_16_bits = set[int]()  # tied ones are held in fp32 if all of their modules can
    for owner, _, parameter, _ in trained:
        can_cast = can_derive(owner) and all(map(can_derive, _users(owner, parents)))
        if is_sharded(parameter) or not can_cast:
            in_16_bits.add(id(parameter))
    for owner, key, parameter, dtype in trained:
        if id(parameter) in in_16_bits:
            continue
        _set_type(owner, key, dtype)
        _hold_buffers(owner)
        for user in _users(owner, parents):
            compute_in(user, dtype, casts_output=not isinstance(user, classes(LightningModule)))
        cast_in_place(parameter, torch.float32)
    for _, _, dtype in full_precision_parameters(module):  # those of parts that were converted before too
        if can_derive(module):
            compute_in(module, dtype)


def _set_type(owner: nn.Module, key: str, dtype: torch.dtype) -> None:
    own: FullPrecision = derive(FullPrecision, owner)
    own.types_before = {**own.types_before, key: dtype}


def _hold_buffers(owner: nn.Module) -> None:
    """Hold the 16-bit buffers of a module that trains in fp32, and those of its parametrizations (spectral_norm)."""
    for part in owner.modules() if isinstance(owner, ParametrizationList) else [owner]:
        for key, buffer in part.named_buffers(recurse=False):
            if buffer.dtype in IN_16_BITS and can_derive(part):
                _set_type(part, key, buffer.dtype)
                cast_in_place(buffer, torch.float32)


def _parents(module: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    parents: dict[nn.Module, list[nn.Module]] = {}
    for parent in module.modules():
        for child in parent.children():
            parents.setdefault(child, []).append(parent)
    return parents


def _users(owner: nn.Module, parents: dict[nn.Module, list[nn.Module]]) -> Iterator[nn.Module]:
    """The modules whose forward passes use the parameters of a module: itself, or the next ones around it."""
    has_forward = type(owner).forward is not nn.Module.forward  # nn.ParameterList has none
    if has_forward:
        yield owner
    for parent in parents.get(owner, []):
        if not has_forward or isinstance(parent, nn.MultiheadAttention):  # it uses the weight of its `out_proj`
            yield from _users(parent, parents)


def can_derive(part: nn.Module) -> bool:
    """Whether the class of a module decides how it computes."""
    return "forward" not in vars(part) and not isinstance(part, torch.jit.ScriptModule)


def compute_in(part: nn.Module, dtype: torch.dtype, casts_output: bool = False) -> None:
    """Let a module compute under autocast; the first type stays, where parameters had several."""
    own: FullPrecision = derive(FullPrecision, part)
    if own.autocast_dtype not in IN_16_BITS:
        own.autocast_dtype = dtype
    own.casts_output = own.casts_output or casts_output


def full_precision_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.dtype]]:
    """Name, value and 16-bit type of each parameter that is held in fp32; tied ones with the first name."""
    seen = set[int]()
    for name, part in module.named_modules():
        for key, dtype in part.types_before.items() if isinstance(part, FullPrecision) else ():
            parameter = part._parameters.get(key)
            if parameter is None or parameter.dtype is not torch.float32 or dtype not in IN_16_BITS:
                continue
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield join(name, key), parameter, dtype


def undo_full_precision(module: nn.Module) -> None:
    """Give each module the class that it had, and its buffers their types, in place; its parameters do not change."""
    for part in module.modules():
        if not isinstance(part, FullPrecision):
            continue
        for key, buffer in part.named_buffers(recurse=False):
            cast_in_place(buffer, part.types_before.get(key, buffer.dtype))
        for name in ("types_before", "autocast_dtype", "casts_output"):
            vars(part).pop(name, None)
        if "classes_before" in vars(type(part)):  # else a library derived a class from it (parametrizations)
            restore(part, FullPrecision)


def hold_in_fp32(
    module: nn.Module, compute_dtype: ComputeDtype, device: torch.device | None = None, decide: Decide = reason_for_fp32
) -> list[str]:
    """Hold a module in fp32 where its device should compute in fp32, in place; else give it its 16-bit types.

    Args:
        module: A converted module; what trains in full is in fp32 already.
        compute_dtype: As in `QLoRAConfig`. With "fp16" a module is held on every device, with "bf16" on none.
        device: The device that it will be on; None: where it is.
        decide: Why a device holds a type in fp32; None: it does not.

    Returns:
        The reason for each type that is held in fp32.
    """
    if compute_dtype == "bf16":
        return []
    device = device or _device_of(module)
    parts = list(module.modules())
    types = [dtype for dtype in IN_16_BITS if any(dtype in _types(part) for part in parts)]
    if compute_dtype == "fp16":
        reasons: dict[torch.dtype, Any] = dict.fromkeys(types, REASON_OF_FP16)
    else:
        reasons = {dtype: decide(device, dtype) for dtype in types}
    if not all(reasons.values()):
        release(module)
    slow = [dtype for dtype in types if reasons[dtype]]
    _hold(parts, slow, EVERYWHERE if compute_dtype == "fp16" else device.type)
    return [reasons[dtype] for dtype in slow]


def _types(part: nn.Module) -> set[torch.dtype]:
    """The types of what a module holds itself and computes with, before they were held in fp32."""
    types = {tensor.dtype for tensor in _own_tensors(part).values()}
    if isinstance(part, HeldTypes):
        types |= {*part.held_types.values()}
    if isinstance(part, PackedLayer):
        types.add(part.weight_dtype)
    if isinstance(part, FullPrecision) and part.autocast_dtype is not None:
        types.add(part.autocast_dtype)
    return types


def _own_tensors(part: nn.Module) -> dict[str, Tensor]:
    return dict([*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)])


def _hold(parts: list[nn.Module], slow: Collection[torch.dtype], device: str) -> None:
    """Cast the values of these types to fp32, one after another."""
    tensors = [(part, key, tensor, tensor.dtype) for part in parts for key, tensor in _own_tensors(part).items()]
    for part, key, tensor, dtype in tensors:  # listed before tied ones are cast
        if dtype not in slow or is_sharded(tensor):
            continue
        if not isinstance(part, HeldTypes) and can_derive(part):
            derive(FullPrecision, part)
        if isinstance(part, HeldTypes):
            part.set_held({key: dtype}, device)
        if tensor.dtype is dtype:
            cast_in_place(tensor, torch.float32)
    for part in parts:
        if isinstance(part, PackedLayer) and part.weight_dtype in slow:
            part.set_held({"weight": part.weight_dtype}, device)
            part.weight_dtype = torch.float32
        if isinstance(part, FullPrecision) and part.autocast_dtype is not None and part.autocast_dtype in slow:
            part.set_held({"forward": part.autocast_dtype}, device)


def _device_of(module: nn.Module) -> torch.device:
    """The device of a module; of one that is on the meta device, the one that it will be loaded to."""
    for part in module.modules():
        tensors = [part.packed] if isinstance(part, PackedLayer) else _own_tensors(part).values()
        device = next((tensor.device for tensor in tensors if not tensor.is_meta), None)
        if device is not None:
            return device
    return torch.accelerator.current_accelerator() or torch.device("cpu")
