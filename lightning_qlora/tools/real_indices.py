"""Positions and masks with values on a model without data.

The code of models reads values: transformers omits the causal mask if the positions are those of one sequence a row.
Within `RealIndices`, tensors that are computed from numbers and real tensors alone are real. All other tensors have no
data.
"""

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGEST = 1 << 22  # elements of a real tensor: attention masks may have more


class RealIndices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """See the top of this file; it is entered within a FakeTensorMode that allows real inputs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        try:
            result = func(*args, **kwargs)  # without data, to know its size
            if any(isinstance(leaf, Tensor) and leaf.numel() > LARGEST for leaf in tree_leaves(result)):
                return result
        except (DataDependentOutputException, DynamicOutputShapeException):
            pass
        with unset_fake_temporarily():
            return func(*args, **kwargs)
