"""LoRA: the operands of an adapter, as `PackedBytes` are those of a 4-bit weight."""

from typing import NamedTuple

from torch import Tensor


class LoRA(NamedTuple):
    """The adapter of one call: s (drop(x) A^T) B^T.

    The ops of `ops.py` get its fields one by one, in this order.
    """

    a: Tensor  # [r, in], any float type; of experts [experts, r, in]
    b: Tensor  # [out, r]; of experts [experts, out, r]
    scaling: float = 1.0  # the factor s
    p: float = 0.0  # probability of dropping an element of x
    seed: Tensor | None = None  # int64 [1] on the CPU, which makes the mask of both passes; None: no dropout
    in_fp16: bool = False  # x is fp32, and all products of the call are those of `half.Half`
