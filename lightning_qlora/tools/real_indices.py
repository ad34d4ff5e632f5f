"""Indices with values on a model without data: positions, masks, and the experts that tokens choose.

The code of models reads values. transformers omits the causal mask if positions show that nothing is packed, and some
mixtures loop over the experts that tokens chose (`nonzero`, `tolist`). Within `RealIndices`, tensors that are computed
from numbers and real tensors alone are real, and so are the indices that `topk` and `argmax` return: every expert gets
the same number of tokens. All other tensors stay without data.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGEST = 1 << 22  # elements of a real tensor: routing tables have tokens * experts, attention masks may have more


class RealIndices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """See the top of this file; to be entered within a FakeTensorMode that allows real inputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._choices = 0  # so that a second choice (argmax of the rest) is another expert

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            result = func(*args, **kwargs)
            if func is torch.ops.aten.topk.default and _is_last(args[0], *args[2:3]):
                return result[0], self._choose(result[1], args[0].shape[-1])
            if func is torch.ops.aten.argmax.default and _is_last(args[0], *args[1:2]):
                self._choices += 1
                return self._choose(result, args[0].shape[-1])
            return result
        try:
            result = func(*args, **kwargs)  # without data, to know its size
            if any(isinstance(leaf, Tensor) and leaf.numel() > LARGEST for leaf in tree_leaves(result)):
                return result
        except (DataDependentOutputException, DynamicOutputShapeException):
            pass
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _choose(self, like: Tensor, experts: int) -> Tensor:
        """Element i is expert i modulo experts, so the k experts of one token differ."""
        with unset_fake_temporarily():
            chosen = torch.arange(like.numel(), device="cpu").add_(self._choices).remainder_(experts)
            return chosen.view(like.shape)


def _is_last(tensor: Tensor, dim: int | None = -1) -> bool:
    return dim is not None and dim % tensor.dim() == tensor.dim() - 1
