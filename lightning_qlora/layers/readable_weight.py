"""ReadableWeight: what `layer.weight` of a 4-bit layer is, so that code which reads it needs no change.

    layer.weight.shape, .dtype, .device                     cost nothing
    F.linear(x, layer.weight, bias), x @ layer.weight.T     run the fused op of the layer, adapter dropout included
    any other read                                          W + s B A in the weight's type, with gradients for A and B

A function of torch that gets it is called with a plain tensor, computed for this call, whose gradient autograd knows. A
read that is not one of the products above keeps the dense weight for the backward pass, as any weight is kept. Scripted
functions and an `autograd.Function` of other code, which torch calls without asking, get the values, and what they give
back as the gradient of the weight goes on to A and B, through `_Read`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from lightning_qlora.checks import KEEP_DENSE, TRAIN_IN_FULL
from lightning_qlora.tensors.readable import METADATA, Readable, plain, writes

READ_ONLY = (
    "the weight of a 4-bit layer, or of an embedding with rows that train, is read-only, because it is computed at "
    "each use. To replace a 4-bit weight, call layer.quantize_weight(new_weight). If the model itself writes to it, "
    f"{KEEP_DENSE}."
)
OF_NODE = {Tensor.grad.__get__, Tensor.grad_fn.__get__}  # type: ignore[union-attr]
MEMORY = {Tensor.data_ptr, Tensor.untyped_storage}  # safetensors compares and reads it
TRANSPOSES = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.t, torch.t}  # type: ignore[attr-defined]
PRODUCTS = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}


class ReadOnly(Readable):
    """Weights that are computed when a function reads them; nothing can write to them."""

    _is_hf_initialized = True  # transformers does not initialize a parameter that has this mark
    _source: Any  # what computes the values
    _kept: Tensor | None = None  # the values, from the time when code asked where they are

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OF_NODE:  # as of a parameter: modules refuse one with a node, and torch warns of the gradient of it
            return None
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
    return plain(value) if isinstance(value, ReadOnly) else value


class _Read(torch.autograd.Function):
    """A and B -> a readable tensor. A gradient for this tensor itself, of code below autograd, goes on to A and B."""

    @staticmethod
    def forward(ctx: Any, kind: Any, source: Any, argument: Any, *parameters: Tensor) -> Tensor:
        ctx.arguments = kind, source, argument
        ctx.parameters = parameters  # not saved: a recomputation may read the weight more or less often
        ctx.set_materialize_grads(False)
        weight: Tensor = kind(source, argument)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients: dict[Tensor, Tensor | None] = {}
        if gradient is not None:
            creates_graph = torch.is_grad_enabled()
            kind, source, argument = ctx.arguments
            with torch.enable_grad():
                values = kind(source, argument).values()
            trained = [parameter for parameter in ctx.parameters if parameter.requires_grad]
            found = torch.autograd.grad(values, trained, gradient, create_graph=creates_graph, allow_unused=True)
            gradients = dict(zip(trained, found, strict=True))
        return None, None, None, *map(gradients.get, ctx.parameters)


def readable(kind: Any, source: Any, argument: Any, detached: bool = False) -> Any:
    """A tensor of a class, differentiable in the adapter of its source if that trains."""
    if torch.is_grad_enabled() and not (detached or source._qlora_disabled):
        parameters = source.adapter_parameters()
        if any(parameter.requires_grad for parameter in parameters) and not _refuse_nodes():
            return _node(kind, source, argument, *parameters)
    return kind(source, argument, detached)


def _refuse_nodes() -> bool:
    """Transforms, forward mode and traces take no node that has no rules for them."""
    has_rules = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return has_rules or torch._C._get_tracing_state() is not None


# `Function.apply` asks whether a transform of functorch is active, which was asked.
_node: Any = super(torch.autograd.Function, _Read).apply


def without_memory(kind: Any, source: Any, shape: Sequence[int], detached: bool) -> Any:
    """A tensor of a class with the type and device of a source's weight."""
    _, dtype, device = source.weight_metadata()
    weight: ReadOnly = Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)
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
        if func in TRANSPOSES and _is_readable_now(args[0]):
            weight = args[0]
            return readable(ReadableWeight, weight._source, not weight._transposed, weight._is_detached)
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
    return _is_readable_now(weight)


def _is_readable_now(weight: Any) -> bool:
    """The forward method of an autograd.Function, which knows no dropout of an adapter, gets the values."""
    return torch.is_grad_enabled() or not weight.requires_grad


def readable_weight(source: Any, transposed: bool = False) -> Tensor:
    """The weight of a layer for code that reads it: [out, in], or [in, out] if transposed."""
    if torch.compiler.is_compiling():  # a graph holds plain tensors; the compiler removes what nobody reads
        weight: Tensor = source.effective_weight()
        return weight.T if transposed else weight
    return readable(ReadableWeight, source, transposed)  # type: ignore[no-any-return]


def readable_parameter(source: Any) -> Tensor:
    """The same, an nn.Parameter for `isinstance`, since transformers ties only these."""
    weight = readable_weight(source)
    if not torch.compiler.is_compiling():
        weight._is_param = True
    return weight


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias
