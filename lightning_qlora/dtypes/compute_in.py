"""ComputeIn: stands in place of the `forward` of a dense module that computes in another type than it is stored in.

    autocast    parameters in fp32 that train: under autocast in the module's 16-bit type, the output cast back
    held        all in another type than before: 16-bit inputs are cast to it; in fp32 without the autocast of a
                module around it

`full_precision.py` says which modules compute so. A module keeps its class (`instance_method.py`).
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from threading import Lock
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_qlora.dtypes.instance_method import InstanceMethod, OfTraining, add, instance_method
from lightning_qlora.kernels.half_linear import linear_in_half
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.lightning_copies import classes
from lightning_qlora.tensors.device_types import IN_16_BITS, is_our_autocast, lacks_bf16
from lightning_qlora.tensors.held_types import follow_cast, own_tensors, type_after

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
# A product in fp16 takes less time than in fp32, casts of W and x included, from so many elements of W and rows of x.
LARGE = 1 << 22
MANY = 128
# torch has no product of two types for the first two, also under autocast, and a slow one for the third.
TAKES_FP32 = (nn.Bilinear, nn.EmbeddingBag, nn.RMSNorm)


class ComputeIn(InstanceMethod):
    """The forward pass of a dense module, or a step of a LightningModule, in another type than its parameters have.

    Attributes:
        autocast: The 16-bit type of autocast; None, or one that has not 16 bits: without.
        casts_output: Whether the output is cast to that type.
        held: The type that the module is kept in, and computes in in place of that, with 16-bit inputs cast; None: its
            own.
    """

    autocast: torch.dtype | None = None
    casts_output: bool = False
    held: torch.dtype | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if self.held is torch.float32:
            if (narrow := _in_16_bits(self.module)) is not None:  # FSDP cast them
                if own_tensors(self.module):  # a 4-bit layer before it returns fp32
                    args, kwargs = _cast(args, torch.float32, narrow), _cast(kwargs, torch.float32, narrow)
                return self.original(*args, **kwargs)
            with _without_our_autocast(self.module):
                args, kwargs = in_type(args, torch.float32), in_type(kwargs, torch.float32)
                if len(args) == 1 and not kwargs and self.before is None and _is_in_half(self.module, *args):
                    return linear_in_half(*args, self.module.weight, self.module.bias)  # type: ignore[arg-type]
                return self.original(*args, **kwargs)
        dtype = self.dtype
        if dtype is None:
            if self.held is not None:
                args, kwargs = in_type(args, self.held), in_type(kwargs, self.held)
            return self.original(*args, **kwargs)
        if isinstance(self.module, TAKES_FP32):
            args = _cast(args, dtype, torch.float32)
            kwargs = _cast(kwargs, dtype, torch.float32)
        unfused = nullcontext() if torch.compiler.is_compiling() else _without_fused_layers
        with _autocast(self.module, dtype), unfused:
            output = self.original(*args, **kwargs)
        if self.casts_output:
            return _cast(output, torch.float32, dtype)
        return output

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that it computes in whatever its inputs have: fp32, or that of autocast where the module is now."""
        is_autocast = self.autocast in IN_16_BITS
        if self.held is torch.float32 or (self.held is not None and is_autocast):
            return self.held
        return self.autocast if is_autocast else None


class MergedPart(OfTraining):
    """`forward` of a merged part, in 16 bits, of a module that is held in another type: it gets and returns that."""

    def __init__(self, module: nn.Module, held: torch.dtype) -> None:
        super().__init__(module)
        self.held = held

    def call(self, *args: Any, **kwargs: Any) -> Any:
        types = {parameter.dtype for parameter in self.module.parameters()}
        dtype = next((each for each in IN_16_BITS if each in types and self.held not in types), None)
        if dtype is None:
            return self.original(*args, **kwargs)
        given = (args, kwargs)
        args, kwargs = inputs = _cast(given, self.held, dtype)
        output = self.original(*args, **kwargs)
        return output if inputs is given else _cast(output, dtype, self.held)


class FollowCasts(InstanceMethod):
    """`_apply` of a dense module that holds values in fp32: a cast of the module casts what it computes in, too."""

    def call(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        result = self.original(fn, *args, **kwargs)
        part = self.module
        follow_cast(part, fn)
        for method in compute_methods(part):
            if method.held is not None and type_after(fn, method.held) is not method.held:
                method.held = None
            if method.autocast is not None:
                method.autocast = type_after(fn, method.autocast)
        return result


def compute_methods(part: nn.Module) -> list[ComputeIn]:
    methods = [instance_method(part, ComputeIn, name) for name in ("forward", *STEPS)]
    return [method for method in methods if method is not None]


def make_compute_methods(part: nn.Module) -> list[ComputeIn]:
    """Those of its forward pass, and of the steps of a LightningModule, made where there is none."""
    names = ["forward"]
    if isinstance(part, classes(LightningModule)):
        names += STEPS
    for name in names:
        if has_method(part, name) and instance_method(part, ComputeIn, name) is None:
            add(ComputeIn(part, name))
    let_follow_casts(part)
    return compute_methods(part)


def compute_in(part: nn.Module, dtype: torch.dtype, casts_output: bool = False) -> None:
    """Let a module compute under autocast; the first type stays, where parameters had several."""
    for method in make_compute_methods(part):
        if method.autocast not in IN_16_BITS:
            method.autocast = dtype
        method.casts_output = method.casts_output or casts_output


def let_follow_casts(part: nn.Module) -> None:
    """Let casts of a dense module reach its types before; 4-bit layers cast theirs in their own `_apply`."""
    can_follow = not isinstance(part, PackedLayer) and not is_script(part)
    if can_follow and instance_method(part, FollowCasts, "_apply") is None:
        add(FollowCasts(part, "_apply"))


def has_method(part: nn.Module, name: str) -> bool:
    """Whether a module has a method of this name that its class, or other code, wrote; nn.ParameterList has none."""
    inherited = [getattr(kind, name, None) for kind in (nn.Module, *classes(LightningModule))]
    return name in vars(part) or getattr(type(part), name, None) not in inherited


def is_script(part: nn.Module) -> bool:
    """Whether nothing can stand in place of a method: TorchScript compiled them."""
    return isinstance(part, torch.jit.ScriptModule)


def output_dtype(part: nn.Module, input_dtype: torch.dtype) -> torch.dtype:
    """The type of a layer's output without autocast of the caller, for an input of a type."""
    if isinstance(part, PackedLayer):
        return part.weight_dtype if part.is_held else input_dtype
    dtypes = (method.dtype or method.held for method in compute_methods(part))
    return next((dtype for dtype in dtypes if dtype is not None), input_dtype)


def compute_types(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, torch.dtype]:
    """Name of each dense module whose `forward` has another in its place -> the type that it computes in."""
    methods = [(name, instance_method(part, ComputeIn)) for name, part in modules]
    return {name: method.dtype for name, method in methods if method is not None and method.dtype is not None}


def takes_halves(x: Any) -> bool:
    """Whether x may be multiplied in fp16 with powers of two: fp32 in eager mode, on a card that has no bf16."""
    return (
        type(x) is Tensor
        and x.dtype is torch.float32
        and lacks_bf16(x.device)
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def _is_in_half(module: nn.Module, x: Any) -> bool:
    """Whether a dense layer is large, and gets so many rows, that casts of both to fp16 take less time than fp32."""
    weight = module.weight if type(module) is nn.Linear else None
    return (
        type(weight) is nn.Parameter
        and weight.numel() >= LARGE
        and takes_halves(x)
        and x.numel() >= MANY * x.shape[-1]
        and not any(parameter.requires_grad for parameter in module.parameters())
    )


def _in_16_bits(module: nn.Module) -> torch.dtype | None:
    """The 16-bit type of a tensor of a module, or, without tensors of its own, of a module in it."""
    own = [*module._parameters.values(), *module._buffers.values()]
    return next((t.dtype for t in own or module.parameters() if t is not None and t.dtype in IN_16_BITS), None)


def _autocast(module: nn.Module, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast on the device of a module; without the cache of casts, so that each use sees the present value."""
    device = next(module.parameters()).device.type
    if device == "meta":
        return nullcontext()
    return torch.autocast(device, dtype, cache_enabled=False)


def _without_our_autocast(module: nn.Module) -> AbstractContextManager[Any]:
    """Without the autocast of a module around this one; the user's stays."""
    if not is_our_autocast():
        return nullcontext()
    device = next((tensor.device.type for tensor in own_tensors(module).values()), "meta")
    if device == "meta":
        return nullcontext()
    return torch.autocast(device, enabled=False)


class _WithoutFusedLayers:
    """torch's fused encoder layers take weights of one type; they refuse autocast, but ask for that of CUDA alone.

    The switch is that of all threads, so the last of the forward passes that run gives it back.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._running = 0
        self._before = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._running:
                self._before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if not self._running:
                torch.backends.mha.set_fastpath_enabled(self._before)


_without_fused_layers = _WithoutFusedLayers()


def _cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """The tensors of one type in another, wherever they stand in a value; losses as they are."""
    return cast_values(value, lambda tensor: tensor.to(after) if tensor.dtype is before and tensor.ndim else tensor)


def in_type(value: Any, dtype: torch.dtype) -> Any:
    """The 16-bit tensors in another type, wherever they stand in a value."""
    return cast_values(value, lambda tensor: tensor.to(dtype) if tensor.dtype in IN_16_BITS else tensor)


def cast_values(value: Any, cast: Callable[[Tensor], Tensor]) -> Any:
    """A value with the tensors in it cast: in tuples, lists, dicts and dataclasses.

    What has nothing to cast stays the same object, so a forward pass may append to a list of its caller.
    """
    if isinstance(value, Tensor):
        return cast(value)
    if isinstance(value, Mapping):
        changed = _changed(value.items(), cast)
        if changed:
            value = copy.copy(value)
            for key, new in changed.items():
                value[key] = new
    elif isinstance(value, (tuple, list)):
        changed = _changed(enumerate(value), cast)
        if changed:
            values = [changed.get(index, old) for index, old in enumerate(value)]
            value = type(value)(*values) if hasattr(value, "_fields") else type(value)(values)
    elif is_dataclass(value) and not isinstance(value, type):
        changed = _changed(((field.name, getattr(value, field.name, None)) for field in fields(value)), cast)
        if changed:
            value = copy.copy(value)
            for name, new in changed.items():
                object.__setattr__(value, name, new)  # also of a frozen one
    return value


def _changed(items: Iterable[tuple[Any, Any]], cast: Callable[[Tensor], Tensor]) -> dict[Any, Any]:
    changed = {}
    for key, old in items:
        new = cast_values(old, cast)
        if new is not old:
            changed[key] = new
    return changed
