"""ReadableStack: what a parameter with the weights of all experts is for code that reads it.

    stack[3]               the readable weight of one expert
    torch.bmm(x, stack)    runs the fused op of each expert, for [experts, in, out]

Any other function gets W + s B A of all experts.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qlora.layers.readable_weight import ReadOnly, readable, readable_weight, without_memory

UNBINDS = {Tensor.unbind, torch.unbind}


class Expert(NamedTuple):
    """One expert of a stack, as the source of a readable weight."""

    stack: Any  # a `QLoRAExperts`
    matrix: Any  # its `Matrix`

    def weight_metadata(self) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
        shape, dtype, device = self.stack.weight_metadata()
        return shape[1:], dtype, device

    def adapter_parameters(self) -> list[Tensor]:
        """The views of this expert: a gradient of its weight has their size, not that of the stack."""
        return [value for value in self.matrix if isinstance(value, Tensor)]

    @property
    def _qlora_disabled(self) -> int:
        return self.stack._qlora_disabled  # type: ignore[no-any-return]

    def effective_weight(self) -> Tensor:
        return self.stack.effective_matrix(self.matrix)  # type: ignore[no-any-return]

    def linear_by_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.stack.compute(x, self.matrix, bias)  # type: ignore[no-any-return]


class ReadableStack(ReadOnly):
    """The weights of a `QLoRAExperts` in the shape of the parameter that it was."""

    @staticmethod
    def __new__(cls, source: Any, shape: tuple[int, ...] | None = None, detached: bool = False) -> "ReadableStack":
        """A tensor without memory. `shape`: that of a view; None: that of the parameter."""
        return without_memory(cls, source, shape or source.weight_shape, detached)  # type: ignore[no-any-return]

    def values(self) -> Tensor:
        weight: Tensor = self._source.effective_weight()
        return weight.view(self.shape)

    def detach(self) -> "ReadableStack":
        return ReadableStack(self._source, tuple(self.shape), detached=True)

    def _expert(self, matrix: Any) -> Tensor:
        weight = readable_weight(Expert(self._source, matrix), self._source._transposed)
        return weight.detach() if self._is_detached else weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stack = args[0] if args else None
        if isinstance(stack, ReadableStack):
            experts = stack._source
            if func is Tensor.__getitem__ and _is_number(args[1]) and stack.dim() == 3:
                (matrix,) = experts.matrices([range(len(experts))[int(args[1])]])
                return stack._expert(matrix)
            # `for weight in stack` calls unbind(0).
            if func in UNBINDS and args[1:] in ((), (0,)) and not kwargs and stack.dim() == 3:
                return tuple(stack._expert(matrix) for matrix in experts.matrices())
            if func in (Tensor.view, Tensor.reshape) and experts.flat:
                shape = (len(experts), *experts.matrix_shape)
                sizes = args[1:] if isinstance(args[1], int) else args[1]
                if tuple(sizes) in (shape, (-1, *shape[1:])):
                    return readable(ReadableStack, experts, shape, stack._is_detached)
        elif func in (torch.bmm, Tensor.bmm) and isinstance(args[1], ReadableStack) and args[1]._source._transposed:
            x = args[0]
            experts = args[1]._source
            ends = torch.arange(1, len(experts) + 1, dtype=torch.int32, device=x.device) * x.shape[1]
            return experts(x.flatten(0, 1), ends).view(len(experts), -1, experts.out_features)
        return super().__torch_function__(func, types, args, kwargs)


def _is_number(index: Any) -> bool:
    """Whether an index is the number of an expert. Booleans, and bytes in a tensor, are masks for torch."""
    if isinstance(index, Tensor):
        is_mask = index.dtype in (torch.bool, torch.uint8)
        return index.ndim == 0 and not index.dtype.is_floating_point and not is_mask
    return isinstance(index, int) and not isinstance(index, bool)
