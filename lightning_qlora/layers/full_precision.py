"""Parameters that train in full: fp32 for the optimizer, and the model's 16-bit type in every forward pass.

    p in parameters(), optimizers, state dicts, and in code outside of forward passes      fp32
    self.p in the forward pass of the module that holds it                                 p.to(bf16), or fp16

In 16 bits most steps of an optimizer are lost: a step of AdamW is about a learning rate, and that of 2e-4 is smaller
than half of the last bit of every bf16 value above 0.1. Autograd records the cast, so the gradient arrives in fp32.
The parameter stays the same object, so optimizers and tied modules keep it. The class of a module becomes a subclass of
the same name (`class_for`), which casts when a forward pass reads an attribute, also for modules with code of their
own. The forward pass of the next module around it reads casts as well: nn.MultiheadAttention reads `out_proj.weight`.
"""

import threading
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.kinds import LINEAR, Derived, derives, kind_of
from lightning_qlora.layers.names import join
from lightning_qlora.lightning_copies import classes

IN_16_BITS = (torch.bfloat16, torch.float16)
HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)  # they read parameters before the forward pass of the module


class _Thread(threading.local):
    reader: nn.Module | None = None  # the module whose forward pass reads parameters in this thread


_thread: _Thread = _Thread()


class FullPrecision(Derived):
    """What `class_for` adds to the class of a module."""

    computes_in: dict[str, torch.dtype]  # key of each parameter in fp32 -> the 16-bit type that it had, and computes in
    class_before: type[nn.Module]  # the class without this one
    _parameters: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        dtype = self.__dict__.get("computes_in", {}).get(name)
        if dtype is None or value is None or value.dtype is not torch.float32:  # FSDP's policy may have cast it
            return value
        if torch.compiler.is_compiling():
            return value.to(dtype)
        reader: Any = _thread.reader
        # FSDP2 reads its shards here in the forward pass of another module; tensor parallelism computes with DTensors.
        reads = reader is not None
        if is_sharded(value):
            reads = reader is self
        return value.to(dtype) if reads else value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in nn.Module; a cast of the module casts what it computes in, too."""
        super()._apply(fn, recurse)  # type: ignore[misc]
        for key, dtype in self.computes_in.items():
            self.computes_in[key] = fn(torch.empty(0, dtype=dtype, device="cpu")).dtype
        return self


class FullPrecisionRNN(FullPrecision):
    """The same for an nn.RNNBase, whose forward pass reads a list of its parameters."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, _: Any) -> None:
        """The list is made when it is read."""


@derives
def class_for(class_before: type[nn.Module]) -> type[nn.Module]:
    """The class of the same name whose forward pass computes in 16 bits with parameters in fp32."""
    kind = FullPrecisionRNN if issubclass(class_before, nn.RNNBase) else FullPrecision
    members: dict[str, Any] = {
        "__module__": class_before.__module__,
        "__qualname__": class_before.__qualname__,
        "__doc__": class_before.__doc__,
        "class_before": class_before,
    }
    if class_before.forward is nn.Embedding.forward:
        members["forward"] = _look_up
    elif class_before.forward is not nn.Module.forward:
        members["forward"] = _reading_forward(class_before)
    return type(class_before.__name__, (kind, class_before), members)


def _look_up(self: Any, input: Tensor) -> Tensor:
    """The forward pass of an nn.Embedding: rows are cast after they are looked up, and not the whole weight."""
    rows = F.embedding(
        input,
        self._parameters["weight"],
        self.padding_idx,
        self.max_norm,
        self.norm_type,
        self.scale_grad_by_freq,
        self.sparse,
    )
    return rows.to(self.computes_in.get("weight", rows.dtype))


def _reading_forward(class_before: Any) -> Callable[..., Any]:
    """The forward pass of a class; in it, attributes are casts."""
    original = class_before.forward
    # An fp32 input would be an error; and code that casts the input to `weight.dtype` reads fp32 there.
    casts_input = issubclass(class_before, (nn.Linear, _ConvNd)) or kind_of(class_before) is not LINEAR

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = self.computes_in.get("weight")
        if casts_input and args and dtype is not None and getattr(args[0], "dtype", None) is torch.float32:
            args = (args[0].to(dtype), *args[1:])
        thread: _Thread = _thread
        before = thread.reader
        thread.reader = self
        try:
            return original(self, *args, **kwargs)
        finally:
            thread.reader = before

    forward.__code__ = forward.__code__.replace()  # torch.compile keeps a limited number of graphs for a code object
    return wraps(original)(forward)


def train_in_full_precision(module: nn.Module) -> dict[str, int]:
    """Hold the 16-bit parameters that train in full in fp32, in place.

    Returns:
        Name -> number of elements, of those that train in 16 bits still: of a LightningModule itself, whose code
        computes outside of a forward pass, of a ScriptModule, and those that hooks of torch.nn.utils read.
    """
    trained: list[tuple[str, Any, str, nn.Parameter, torch.dtype]] = [
        (name, owner, key, parameter, parameter.dtype)
        for name, owner in module.named_modules()
        for key, parameter in owner.named_parameters(recurse=False)
        if parameter.requires_grad and parameter.dtype in IN_16_BITS
    ]
    readers = _Readers(module)
    reads: dict[nn.Module, bool] = {}
    in_16_bits: dict[int, str] = {}
    for name, owner, key, parameter, _ in trained:
        if owner not in reads:
            reads[owner] = readers.become(owner)
        if not reads[owner] or is_sharded(parameter):
            in_16_bits[id(parameter)] = join(name, key)
    sizes: dict[str, int] = {}
    for _, owner, key, parameter, dtype in trained:
        if id(parameter) in in_16_bits:
            sizes[in_16_bits[id(parameter)]] = parameter.numel()
        else:
            owner.computes_in[key] = dtype
            _cast(parameter, torch.float32)
    return sizes


class _Readers:
    """The modules of a module whose forward passes read parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.parents: dict[nn.Module, list[nn.Module]] = {}
        for parent in module.modules():
            for child in parent.children():
                self.parents.setdefault(child, []).append(parent)

    def become(self, owner: nn.Module) -> bool:
        """Let a module, and the next ones around it with a forward pass, read casts; whether its parameters can be."""
        around = [part for part in self._around(owner) if _can_read(part)]
        reads = bool(around)
        if _has_forward(owner):
            reads = _can_read(owner)
        is_hooked = any(isinstance(hook, HOOKS) for hook in owner._forward_pre_hooks.values())
        if not reads or is_hooked:
            return False
        for part in (owner, *around):
            if not isinstance(part, FullPrecision):
                vars(part)["computes_in"] = {}
                part.__class__ = class_for(type(part))
        return True

    def _around(self, owner: nn.Module) -> Iterator[nn.Module]:
        for parent in self.parents.get(owner, []):
            if _has_forward(parent):
                yield parent
            else:  # a ModuleDict
                yield from self._around(parent)


def _has_forward(part: nn.Module) -> bool:
    return type(part).forward is not nn.Module.forward


def _can_read(part: nn.Module) -> bool:
    """Whether a module has a forward pass that its class can change, and that all of its code runs in."""
    fixed: Any = (torch.jit.ScriptModule, *classes(LightningModule))
    return _has_forward(part) and "forward" not in vars(part) and not isinstance(part, fixed)


def _cast(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    """Cast a parameter, and its gradient if there is one, in place: it stays the same object."""
    grad = parameter.grad
    parameter.grad = None
    parameter.data = parameter.data.to(dtype)
    if grad is not None:
        parameter.grad = grad.to(dtype)


def computed_in(module: nn.Module, key: str) -> torch.dtype | None:
    """The 16-bit type in which a parameter in fp32 computes; None for any other."""
    types: dict[str, torch.dtype] = vars(module).get("computes_in", {})
    return types.get(key)


def full_precision_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, torch.dtype]]:
    """Name, value and 16-bit type of each parameter that is held in fp32; tied ones with the first name."""
    seen = set[int]()
    for name, part in module.named_modules():
        for key, dtype in vars(part).get("computes_in", {}).items():
            parameter = part._parameters.get(key)
            if parameter is None or parameter.dtype is not torch.float32 or dtype not in IN_16_BITS:
                continue
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield join(name, key), parameter, dtype


def undo_full_precision(module: nn.Module) -> None:
    """Give each module the class that it had, in place; its parameters do not change."""
    for part in module.modules():
        if not isinstance(part, FullPrecision):
            continue
        part.computes_in.clear()
        if "class_before" in vars(type(part)):  # else a library derived a class from it (parametrizations)
            del part.computes_in
            part.__class__ = part.class_before  # type: ignore[assignment]
            if isinstance(part, nn.RNNBase):
                part._flat_weights = [getattr(part, name, None) for name in part._flat_weights_names]
