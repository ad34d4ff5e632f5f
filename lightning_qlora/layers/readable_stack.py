"""ReadableStack: what a parameter with the weights of all experts reads as, when the experts are 4-bit layers.

stack[3], and each of `unbind`      the readable weight of that expert
torch.bmm(x, stack)                 the fused op of each expert, for [experts, in, out]
any other read                      W + s B A of all experts, with gradients for every A and B
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.layers.readable_weight import METADATA, Readable, readable_weight


class ReadableStack(Readable):
    """The weights of all experts, in the parameter's shape; see the top of this file."""

    _experts: Any  # a QLoRAExperts

    @staticmethod
    def __new__(cls, experts: Any, shape: tuple[int, ...] | None = None) -> "ReadableStack":
        """A tensor with the shape, type and device of the parameter, and no memory."""
        first = experts.layers[0]
        made: ReadableStack = Tensor._make_wrapper_subclass(
            cls, shape or experts.weight_shape, dtype=first.weight_dtype, device=first.packed.device
        )
        made._experts = experts
        return made

    def values(self) -> Tensor:
        """The effective weights."""
        weight: Tensor = self._experts.effective_weight().view(self.shape)
        return weight

    def detached(self) -> "ReadableStack":
        """The same without a gradient."""
        return ReadableStack(self._experts, tuple(self.shape))

    def parameters(self) -> list[nn.Parameter]:
        """The adapters of all experts."""
        layers = self._experts.layers
        return [] if layers[0]._qlora_disabled else [of for layer in layers for of in layer.adapter_parameters()]

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Those of the adapters of all experts."""
        parts = grad.reshape(-1, *self._experts.expert_shape)
        rows = (part.T if self._experts.transposed else part for part in parts)
        each = len(self._inputs) // len(parts)
        adapters = [self._inputs[i::each] for i in range(each)]  # A of all experts, B of all
        grads = map(QLoRALinear.effective_weight_backward, self._experts.layers, rows, *adapters)
        return tuple(of for grads_of_layer in grads for of in grads_of_layer)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stack: Any = args[0] if args else None
        if isinstance(stack, ReadableStack):
            experts = stack._experts
            count, (rows, columns) = len(experts.layers), experts.expert_shape
            if func is Tensor.__getitem__ and _is_number(args[1]) and stack.dim() == 3:
                return readable_weight(experts.layers[int(args[1])], experts.transposed)
            if func in (Tensor.unbind, torch.unbind, Tensor.__iter__) and len(args) == 1 and not kwargs:
                weights = [readable_weight(layer, experts.transposed) for layer in experts.layers]
                return iter(weights) if func is Tensor.__iter__ else tuple(weights)
            if func in (Tensor.view, Tensor.reshape) and experts.flat:
                shape = tuple(args[1:] if isinstance(args[1], int) else args[1])
                if shape in ((-1, rows, columns), (count, rows, columns)):
                    return ReadableStack(experts, (count, rows, columns))
        elif func in (torch.bmm, Tensor.bmm) and isinstance(args[1], ReadableStack) and args[1]._experts.transposed:
            return torch.stack([layer(x) for layer, x in zip(args[1]._experts.layers, stack.unbind(), strict=True)])
        if func not in METADATA and func != Tensor.grad.__get__:  # type: ignore[union-attr]
            args, kwargs = tree_map(_attached, args), tree_map(_attached, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _attached(value: Any) -> Any:
    return value.attached() if isinstance(value, ReadableStack) else value


def _is_number(index: Any) -> bool:
    if isinstance(index, Tensor):
        return index.ndim == 0 and not index.dtype.is_floating_point and index.dtype is not torch.bool
    return isinstance(index, int)
