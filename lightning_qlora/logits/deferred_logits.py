"""DeferredLogits: the output of an output embedding that is not computed until something needs it.

    logits = lm_head(hidden)                        DeferredLogits: knows hidden [..., h] and the head
    logits.float().view(-1, v), logits[:, :-1],     still deferred: shapes, rows, types, and functions of each
    logits / 30, torch.tanh(logits)                 element with a number
    F.cross_entropy(logits, labels, ...)            computed in pieces of rows; see piecewise_cross_entropy.py
    any other function                              gets the real logits, computed once, with their gradient
    logits.retain_grad(), .register_hook(f),        before the loss: the real logits; after it: the gradient of the loss
    autograd.grad(loss, logits)                     goes through the logits that the loss was computed of

In training, the logits of a large vocabulary take more memory than a 4-bit model: they are made, copied to fp32 and
differentiated to give one number. Sources of the idea: Liger Kernel (Hsu et al. 2024), "Cut Your Losses in
Large-Vocabulary Language Models" (Wijmans et al. 2024); both need a changed model or loss.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_map

from lightning_qlora.dtypes.instance_method import InstanceMethod
from lightning_qlora.kernels.half import Half
from lightning_qlora.layers.with_adapter import DISABLED
from lightning_qlora.logits.half_head import half_logits, half_weight
from lightning_qlora.logits.piecewise_cross_entropy import piecewise_cross_entropy
from lightning_qlora.tensors.readable import METADATA, Readable, writes
from lightning_qlora.tensors.values import is_plain

Function = Callable[[Tensor], Tensor]


class Source:
    """One call of a head: its input, its parameters as they were, and autocast."""

    def __init__(self, hidden: Tensor, head: Any, method: InstanceMethod) -> None:
        self.head = head
        self.is_in_loss = False  # whether a loss was computed of these logits in pieces
        self._method = method
        self.trained = [p for p in head.parameters() if p.requires_grad]
        device = hidden.device.type
        self._autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self._tensors = [(tensor, tensor._version) for tensor in (hidden, *head.parameters())]

    def half_weight(self, rows: int) -> Half | None:
        """The weight for `compute`, cast once for all pieces, on cards without bf16."""
        return None if self._autocast[0] else half_weight(self.head, rows)

    def compute(self, hidden: Tensor, weight: Half | None = None) -> Tensor:
        """The logits of some rows of hidden states; RuntimeError if the head or its input changed since the call."""
        enabled, dtype = self._autocast
        with torch.autocast(hidden.device.type, dtype, enabled=enabled):
            now = [self._tensors[0][0], *self.head.parameters()]
            for (tensor, version), current in zip(self._tensors, now, strict=True):
                if tensor is not current or tensor._version != version or DISABLED in vars(self.head):
                    raise RuntimeError(
                        "These logits were not computed yet, and they can't be computed any more: the weight of the "
                        "output embedding or its input changed since (an optimizer step, an operation in place), or "
                        "its adapter is disabled now. Read the logits before that, for example by logits.detach(), or "
                        "pass deferred_logits=False."
                    )
            if weight is not None:
                return half_logits(hidden, weight, self.head.bias)
            logits: Tensor = self._method.original(hidden)
        return logits


class DeferredLogits(Readable):
    """Logits [..., vocabulary] of hidden states [..., h] that are not computed yet; see the top of this file."""

    hidden: Tensor  # the input of the head
    source: Source  # the call of the head; all views of the logits have the same
    functions: tuple[Function, ...]  # of single elements, that were called on the logits, in order
    _parent: "tuple[DeferredLogits, Function] | None"  # the logits that these are a view or a function of
    _real: Tensor | None
    _is_input: bool  # of `torch.autograd.grad`, while it runs

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        source: Source,
        dtype: torch.dtype,
        functions: tuple[Function, ...] = (),
        parent: "tuple[DeferredLogits, Function] | None" = None,
    ) -> "DeferredLogits":
        logits: DeferredLogits = Tensor._make_wrapper_subclass(
            cls, (*hidden.shape[:-1], source.head.out_features), dtype=dtype, device=hidden.device
        )
        logits.hidden = hidden
        logits.source = source
        logits.functions = functions
        logits._parent = parent
        logits._real = None
        logits._is_input = False
        return logits

    def rows(self, of_parent: Function, hidden: Tensor) -> Tensor:
        return DeferredLogits(hidden, self.source, self.dtype, self.functions, (self, of_parent)).attached()

    def compute(self, hidden: Tensor, weight: Half | None = None) -> Tensor:
        logits = self.source.compute(hidden, weight)
        for function in self.functions:
            logits = function(logits)
        return logits

    @property
    def is_computed(self) -> bool:
        """Whether something has read the logits; from then on everything uses the real ones."""
        return self._real is not None or (self._parent is not None and self._parent[0].is_computed)

    def computed(self, keep: bool = False) -> Tensor:
        """The real logits: a plain tensor, computed once for all their views, differentiable.

        `keep` keeps them within activation checkpointing as well, because something writes to them.
        """
        if self._real is not None:
            return self._real
        with torch.enable_grad():  # later readers may need the gradient
            if self._parent is None:
                real = self.compute(self.hidden)
            else:
                parent, function = self._parent
                real = function(parent.computed(keep))
            if self.source.is_in_loss:  # all gradients meet in the logits that the loss was computed of
                real = _Read.apply(self, real.detach())  # type: ignore[no-untyped-call]
        # Within activation checkpointing the recomputation must save the same tensors as the forward pass.
        in_checkpoint = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        if (keep or not in_checkpoint) and not torch.is_inference_mode_enabled():
            self._real = real
        return real

    def values(self) -> Tensor:
        """The real logits, for an operation below autograd."""
        return self.computed().detach()

    def attached(self) -> Tensor:
        """The same as a function of `parameters()`, where autograd records.

        So an `autograd.Function` of other code that gets it may return a gradient for it.
        """
        parameters = self.parameters()
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            parent = self._parent[0] if self._parent else None
            logits: Tensor = _Attached.apply(self, parent, *parameters)  # type: ignore[no-untyped-call]
            return logits
        return self

    def detached(self) -> "DeferredLogits":
        return DeferredLogits(self.hidden, self.source, self.dtype, self.functions, self._parent)

    @property
    def is_asked_for(self) -> bool:
        """Whether code asked for the gradient of these logits, or of those that they are a view or a function of."""
        with torch._C.DisableTorchFunctionSubclass():
            is_asked_for = self._is_input or self.retains_grad or bool(self._backward_hooks)
        return is_asked_for or (self._parent is not None and self._parent[0].is_asked_for)

    def parameters(self) -> list[Any]:
        return [self.hidden, *self.source.trained]

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        again = torch.is_grad_enabled()  # with `create_graph=True`
        with torch.enable_grad():
            hidden = self.hidden
            if not again or not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_()
            inputs = [hidden, *self.source.trained]
            return torch.autograd.grad(self.compute(hidden), inputs, grad, create_graph=again, allow_unused=True)

    def gradient_of_parent(self, grad: Tensor) -> Tensor:
        assert self._parent is not None
        parent, function = self._parent
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            real = parent.computed()
            return torch.autograd.grad(function(real), real, grad, create_graph=again)[0]

    @property
    def data(self) -> Tensor:
        return self.computed(keep=True).detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.computed(keep=True).data = value

    def __setitem__(self, index: Any, value: Any) -> None:
        self.computed(keep=True)[index] = _real(value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        logits = args[0] if args else None
        is_in_loss = isinstance(logits, DeferredLogits) and logits.source.is_in_loss
        is_real = isinstance(logits, DeferredLogits) and logits._real is not None  # `grad` is that of the real ones
        if (func in METADATA and not is_real) or (is_in_loss and func in OF_ITSELF):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in (torch.autograd.grad, torch.autograd.backward):
            return _gradients(func, args, kwargs)
        if func is F.cross_entropy:
            result = _cross_entropy(*args, **kwargs)
        elif isinstance(logits, DeferredLogits) and not logits.is_computed:
            result = _deferred(func, logits, args[1:], kwargs)
        else:
            result = None
        if result is not None:
            return result
        real = partial(_real, keep=writes(func) or func in ASKS)
        return func(*tree_map(real, args), **tree_map(real, kwargs))


class _Attached(torch.autograd.Function):
    """What deferred logits depend on -> the logits. The gradient goes to their parent if code asked for it there."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, parent: DeferredLogits | None, *parameters: Tensor) -> Tensor:
        ctx.logits = logits
        ctx.count = len(parameters)
        ctx.set_materialize_grads(False)
        return logits.detached()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        logits = ctx.logits
        if grad is None:
            return None, None, *[None] * ctx.count
        if logits.is_asked_for:
            return None, logits.gradient_of_parent(grad), *[None] * ctx.count
        return None, None, *logits.gradients(grad)


class _Read(torch.autograd.Function):
    """Deferred logits, and their values -> the values, whose gradient is that of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


ASKS = {Tensor.retain_grad, Tensor.register_hook}
OF_ITSELF = METADATA | ASKS


def _gradients(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.autograd.grad` or `backward`, whose inputs may be logits that a loss was computed of."""
    asked: list[DeferredLogits] = []

    def input_of(value: Any) -> Any:
        if not isinstance(value, DeferredLogits) or not value.source.is_in_loss:
            return _real(value)
        asked.append(value)
        value._is_input = True
        if func is torch.autograd.backward:
            value.retain_grad()
        assert value.grad_fn is not None
        return GradientEdge(value.grad_fn, 0)

    outputs, *inputs = args
    kwargs = {key: tree_map(input_of if key == "inputs" else _real, value) for key, value in kwargs.items()}
    try:
        return func(tree_map(_real, outputs), *tree_map(input_of, inputs), **kwargs)
    finally:
        for logits in asked:
            logits._is_input = False


CASTS = {Tensor.to, Tensor.float, Tensor.bfloat16, Tensor.half}
PRODUCTS = {Tensor.mul, Tensor.div, Tensor.__mul__, Tensor.__rmul__, Tensor.__truediv__, torch.mul, torch.div}
ELEMENTWISE = {*CASTS, *PRODUCTS, Tensor.tanh, torch.tanh}
SHAPES = {Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.contiguous, torch.reshape, torch.flatten}
PLAIN_ARGUMENTS = (int, float, str, torch.dtype, torch.device)  # of casts and functions of each element


def _real(value: Any, keep: bool = False) -> Any:
    return value.computed(keep) if isinstance(value, DeferredLogits) else value


def _deferred(func: Any, logits: DeferredLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of a function that needs no real logits; None for any other."""
    if func is Tensor.__getitem__:
        index = args[0]
        if not isinstance(index, tuple):
            index = (index,)
        return _getitem(logits, index)

    def function(real: Tensor) -> Tensor:
        return func(real, *args, **kwargs)  # type: ignore[no-any-return]

    if func in SHAPES:
        result = function(torch.empty(logits.shape, dtype=logits.dtype, device="meta"))
        # With the whole vocabulary last, each row of the result is a row of the logits, in the same order.
        if result.dtype is not logits.dtype or result.shape[-1:] != logits.shape[-1:]:
            return None
        return logits.rows(function, logits.hidden.reshape(*result.shape[:-1], logits.hidden.shape[-1]))
    arguments = [*args, *kwargs.values()]
    if func in ELEMENTWISE and len(arguments) < 2 and all(type(value) in PLAIN_ARGUMENTS for value in arguments):
        result = function(torch.empty(0, dtype=logits.dtype, device=logits.device))
        if result.device == logits.device and result.is_floating_point():
            if func in CASTS and result.dtype is logits.dtype:
                return logits
            functions = (*logits.functions, function)
            return DeferredLogits(logits.hidden, logits.source, result.dtype, functions, (logits, function)).attached()
    return None


def _getitem(logits: DeferredLogits, index: tuple[Any, ...]) -> Tensor | None:
    """An index that chooses among rows alone, so that the vocabulary stays whole and last."""
    spans = 0  # dimensions that the index takes
    for part in index:
        if isinstance(part, Tensor) and part.dtype is not torch.uint8:
            spans += part.ndim if part.dtype is torch.bool else 1
        elif type(part) in (int, slice):
            spans += 1
        elif part is not Ellipsis:
            return None
    has_ellipsis = any(part is Ellipsis for part in index)
    takes_last = spans == logits.dim() or (has_ellipsis and index[-1] is not Ellipsis)
    if takes_last and not (isinstance(index[-1], slice) and index[-1] == slice(None)):
        return None
    return logits.rows(lambda real: real[index], logits.hidden[index])


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """`F.cross_entropy` in pieces of rows; None for anything but the mean or the sum over the rows of a matrix."""
    if not isinstance(input, DeferredLogits) or input.is_computed or input.dim() != 2:
        return None
    is_index = is_plain(target) and not target.is_floating_point()
    if not is_index or target.shape != input.shape[:1]:
        return None
    if weight is not None or label_smoothing or size_average is not None or reduce is not None:
        return None
    if reduction not in ("mean", "sum"):
        return None
    loss = piecewise_cross_entropy(input, target, ignore_index, reduction)
    input.source.is_in_loss = input.source.is_in_loss or loss.requires_grad
    return loss
