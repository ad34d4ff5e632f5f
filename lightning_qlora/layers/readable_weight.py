"""ReadableWeight: what `layer.weight` of a 4-bit layer is, so that code which reads it needs no change.

    layer.weight.shape, .dtype, .device                     cost nothing
    F.linear(x, layer.weight, bias), x @ layer.weight.T     run the fused op of the layer, adapter dropout included
    any other read                                          W + s B A in the weight's type, with gradients for A and B

A plain tensor, decoded for each reader, would give the adapter no gradient. This weight is the output of `_Effective`,
so autograd gives one, also to an `autograd.Function` that receives the weight and returns a gradient for it. Values are
computed below autograd, in `__torch_dispatch__`, when an op reads them. A read that is not one of the products above
keeps the dense weight for the backward pass, as any weight is kept.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

READ_ONLY = (
    "the weight of a 4-bit layer, or of an embedding with rows that train, is read-only, because it is computed at "
    "each use. To replace a 4-bit weight, call layer.quantize_weight(new_weight). If the model itself writes to it, "
    "name the layer in exclude_modules, so that it stays dense."
)


# What tells the properties of a tensor without its values.
METADATA = {
    getattr(Tensor, name).__get__
    for name in (
        "dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "layout", "is_meta", "is_leaf", "grad_fn",
        "is_sparse", "is_nested", "is_quantized",
    )
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size,
    Tensor.__len__, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip


class Readable(Tensor):
    """A tensor without memory whose values are computed when an operation reads them; nothing can write to it."""

    _is_hf_initialized = True  # transformers does not initialize a parameter that has this mark
    values: Callable[[], Tensor]  # a plain tensor of this shape
    detached: Callable[[], "Readable"]  # the same without a gradient
    parameters: Callable[[], list[Any]]  # the parameters that the values depend on
    gradients: Callable[[Tensor], tuple[Tensor, ...]]  # those of the parameters from that of the values
    _inputs: list[Any]  # the parameters when the tensor was made: those of a layer may be those of another call later

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def attached(self) -> Tensor:
        """The same as a function of the parameters, where autograd records."""
        parameters = self._inputs = self.parameters()
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            made: Tensor = _Effective.apply(self, *parameters)  # type: ignore[no-untyped-call]
            return made
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if isinstance(value, Readable) and argument.alias_info and argument.alias_info.is_write:
                raise RuntimeError(f"{func}: {READ_ONLY}")

        def plain(value: Any) -> Any:
            return value.values() if isinstance(value, Readable) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs))

    @property
    def data(self) -> Tensor:
        """The same without a gradient; a write to it is refused, not lost."""
        return self.detached()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise RuntimeError(f"weight.data = ...: {READ_ONLY}")

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """Refused, because no parameter would train; False is allowed, since the 4-bit weight is frozen."""
        if requires_grad:
            raise RuntimeError(
                "weight.requires_grad_(): a 4-bit weight can't train; its adapter does. To train the layer in full, "
                "name it in modules_to_save."
            )
        return self

    def __setitem__(self, *_: Any) -> None:
        raise RuntimeError(f"weight[...] = ...: {READ_ONLY}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A dense copy."""
        return self.values().detach().clone()

    def numpy(self, *, force: bool = False) -> Any:
        """The values as an array."""
        return self.values().detach().numpy(force=force)

    def tolist(self) -> Any:
        """The values as nested lists."""
        return self.values().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.values().detach()!r})"


class _Effective(torch.autograd.Function):
    """Adapter parameters -> the weight that contains them."""

    @staticmethod
    def forward(ctx: Any, readable: Readable, *parameters: Tensor) -> Tensor:
        ctx.readable, ctx.count = readable, len(parameters)
        ctx.set_materialize_grads(False)
        return readable.detached()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *([None] * ctx.count if grad is None else ctx.readable.gradients(grad))


class ReadableWeight(Readable):
    """The weight of one layer, [out, in], or [in, out] if transposed; see the top of this file."""

    _source: Any  # the layer, whose own weights are [out, in]
    _transposed: bool

    @staticmethod
    def __new__(cls, source: Any, transposed: bool) -> "ReadableWeight":
        """A tensor with the layer's shape, type and device, and no memory."""
        shape, dtype, device = source.weight_metadata()
        shape = shape[::-1] if transposed else shape
        made: ReadableWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._source, made._transposed = source, transposed
        return made

    def values(self) -> Tensor:
        """The effective weight."""
        weight: Tensor = self._source.effective_weight()
        return weight.T if self._transposed else weight

    def detached(self) -> "ReadableWeight":
        """The same without a gradient."""
        return ReadableWeight(self._source, self._transposed)

    def detach(self) -> "ReadableWeight":
        """The same without a gradient, and no copy, so a write to it is refused, not lost."""
        return self.detached()

    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapter."""
        return [] if self._source._qlora_disabled else self._source.adapter_parameters()

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Those of the adapter."""
        rows = grad.T if self._transposed else grad
        return tuple(self._source.effective_weight_backward(rows, *self._inputs))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.is_leaf.__get__:  # type: ignore[attr-defined]
            return True  # as the parameter that it replaces; torch's `distribute_tensor` asks
        if func in TRANSPOSES:
            return readable_weight(args[0]._source, not args[0]._transposed)
        if func is torch.nn.functional.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, ReadableWeight) and not (weight._transposed or isinstance(x, Readable)):
                return weight._source.linear_by_weight(x, bias)
        if func in PRODUCTS and len(args) == 2 and not kwargs and isinstance(args[1], ReadableWeight):
            x, weight = args
            if weight._transposed and not isinstance(x, Readable) and x.dtype is weight.dtype:
                return weight._source.linear_by_weight(x, None)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


TRANSPOSES = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t}  # type: ignore[attr-defined]
PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


def readable_weight(source: Any, transposed: bool = False) -> Tensor:
    """The weight of a layer for code that reads it: [out, in], or [in, out] if transposed."""
    if torch.compiler.is_compiling():  # a graph holds plain tensors; the compiler removes what nobody reads
        weight: Tensor = source.effective_weight()
        return weight.T if transposed else weight
    return ReadableWeight(source, transposed).attached()


def readable_parameter(source: Any) -> Tensor:
    """The same, an nn.Parameter for `isinstance`, since transformers ties only these."""
    made = readable_weight(source)
    if not torch.compiler.is_compiling():
        made._is_param = True
    return made


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    """The arguments of F.linear, by position or by name."""
    return input, weight, bias
