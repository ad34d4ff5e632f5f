"""ReadableWeight: what `layer.weight` of a 4-bit layer is, so that code which reads it needs no change.

    layer.weight.shape, .dtype, .device                     cost nothing
    F.linear(x, layer.weight, bias), x @ layer.weight.T     run the fused op of the layer, adapter dropout included
    any other read                                          W + s B A in the weight's type, with gradients for A and B

A function of torch that gets it is called with a plain tensor, computed for this call, whose gradient autograd knows. A
read that is not one of the products above keeps the dense weight for the backward pass, as any weight is kept. Scripted
functions and an `autograd.Function` of other code, which torch calls without asking, get the values, and what they give
back as the gradient of the weight goes on to A and B.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_qlora.checks import KEEP_DENSE, TRAIN_IN_FULL
from lightning_qlora.tensors.readable import METADATA, Readable, plain, writes

READ_ONLY = (
    "the weight of a 4-bit layer, or of an embedding with rows that train, is read-only, because it is computed at "
    "each use. To replace a 4-bit weight, call layer.quantize_weight(new_weight). If the model itself writes to it, "
    f"{KEEP_DENSE}."
)
IS_LEAF = Tensor.is_leaf.__get__  # type: ignore[attr-defined]
MEMORY = {Tensor.data_ptr, Tensor.untyped_storage}  # safetensors compares and reads it
TRANSPOSES = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t}  # type: ignore[attr-defined]
PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


class ReadOnly(Readable):
    """Weights that are computed when a function reads them; nothing can write to them."""

    _is_hf_initialized = True  # transformers does not initialize a parameter that has this mark
    _source: Any  # what computes the values
    _kept: Tensor | None = None  # the values, from the time when code asked where they are
    _passes_on: bool = False  # whether a gradient for this tensor goes on to A and B

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == IS_LEAF:  # an optimizer would get a tensor that no gradient reaches, and refuses what is no leaf
            return not args[0].requires_grad
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in MEMORY:
            if args[0]._kept is None:
                args[0]._kept = plain(args[0]).detach().contiguous()
            return func(args[0]._kept)
        outputs = [kwargs.get("out")]
        if writes(func):
            outputs += args[:1]
        if any(isinstance(value, ReadOnly) for value in tree_leaves(outputs)):
            raise RuntimeError(f"{getattr(func, '__name__', func)}: {READ_ONLY}")
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, ReadOnly):
                value.pass_on()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def pass_on(self) -> bool:
        """Let a gradient for this tensor itself go on to A and B, of code below autograd; whether there may be one."""
        if self.requires_grad and not self._passes_on:
            self._passes_on = True
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(self._give)  # type: ignore[no-untyped-call]
        return self._passes_on

    def _give(self, gradient: Tensor) -> None:
        with torch.enable_grad():
            values = self.values()
        torch.autograd.backward(values, gradient)

    @property
    def data(self) -> Tensor:
        """The same without a gradient; a write to it is refused, not lost."""
        return self.detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise RuntimeError(f"weight.data = ...: {READ_ONLY}")

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Refused, because no parameter would train; False is allowed, since the 4-bit weight is frozen."""
        if requires_grad:
            raise RuntimeError(
                f"weight.requires_grad_(): a 4-bit weight can't train; its adapter does. Or {TRAIN_IN_FULL}."
            )
        return self


def _plain(value: Any) -> Any:
    """As `plain`; what is no weight reads itself, with its gradient."""
    if not isinstance(value, ReadOnly):
        return value
    if not torch.is_grad_enabled():  # as in the forward method of an autograd.Function
        value.pass_on()
    return plain(value)


def without_memory(kind: Any, source: Any, shape: Sequence[int], detached: bool) -> Any:
    """A tensor of a class with the type and device of a source's weight; it needs a gradient if the adapter does."""
    _, dtype, device = source.weight_metadata()
    trains = torch.is_grad_enabled() and not (detached or source._qlora_disabled)
    requires_grad = trains and any(parameter.requires_grad for parameter in source.adapter_parameters())
    weight: ReadOnly = Tensor._make_wrapper_subclass(
        kind, shape, dtype=dtype, device=device, requires_grad=requires_grad
    )
    weight._source = source
    weight._is_detached = detached
    return weight


class ReadableWeight(ReadOnly):
    """The weight of a source, [out, in], or [in, out] if transposed.

    A source is a layer (`qlora_linear.py`, `trainable_tokens.py`), or one matrix of a stack (`experts/`).
    """

    _transposed: bool

    @staticmethod
    def __new__(cls, source: Any, transposed: bool = False, detached: bool = False) -> "ReadableWeight":
        shape = source.weight_metadata()[0]
        weight: ReadableWeight = without_memory(cls, source, shape[::-1] if transposed else shape, detached)
        weight._transposed = transposed
        return weight

    def values(self) -> Tensor:
        weight: Tensor = self._source.effective_weight()
        return weight.T if self._transposed else weight

    def detach(self) -> "ReadableWeight":
        """The same without a gradient, and no copy, so a write to it is refused, not lost."""
        return ReadableWeight(self._source, self._transposed, detached=True)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in TRANSPOSES:
            weight = args[0]
            return ReadableWeight(weight._source, not weight._transposed, weight._is_detached)
        if func is torch.nn.functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if _is_product(x, weight, transposed=False):
                return weight._source.linear_by_weight(x, bias)
        if func in PRODUCTS and len(args) == 2 and not kwargs:
            x, weight = args
            if _is_product(x, weight, transposed=True) and x.dtype is weight.dtype:
                return weight._source.linear_by_weight(x, None)
        return super().__torch_function__(func, types, args, kwargs)


def _is_product(x: Any, weight: Any, transposed: bool) -> bool:
    is_weight = isinstance(weight, ReadableWeight) and not weight._is_detached
    if not is_weight or weight._transposed is not transposed or isinstance(x, Readable):
        return False
    # The forward method of an autograd.Function, which knows no dropout of an adapter, gets the values.
    return torch.is_grad_enabled() or not weight.pass_on()


def readable_weight(source: Any, transposed: bool = False) -> Tensor:
    """The weight of a layer for code that reads it: [out, in], or [in, out] if transposed."""
    if torch.compiler.is_compiling():  # a graph holds plain tensors; the compiler removes what nobody reads
        weight: Tensor = source.effective_weight()
        return weight.T if transposed else weight
    return ReadableWeight(source, transposed)


def readable_parameter(source: Any) -> Tensor:
    """The same, an nn.Parameter for `isinstance`, since transformers ties only these."""
    weight = readable_weight(source)
    if not torch.compiler.is_compiling():
        weight._is_param = True
    return weight


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias
