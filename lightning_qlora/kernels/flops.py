"""Operations of a 4-bit layer for torch's FlopCounterMode, and so for Lightning's measure_flops and ThroughputMonitor.

They are those of a frozen dense layer with an adapter; decoding is not counted. With a dispatch mode as FlopCounterMode
`lora_linear` runs the ops of `ops`, which the mode sees.
"""

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch


@cache
def register_flop_formulas() -> None:
    """Register the formulas with torch; they get shapes instead of tensors."""
    from torch.utils.flop_counter import register_flop_formula  # imports Triton, where it is installed

    @register_flop_formula(torch.ops.lightning_qlora.lora_linear)
    def _(x: Sequence[int], *rest: Any, **_: Any) -> int:  # x W^T, x A^T, (x A^T) B^T
        (r, inputs), outputs = rest[4], rest[7]
        return int(2 * prod(x[:-1]) * (inputs * outputs + r * (inputs + outputs)))

    @register_flop_formula(torch.ops.lightning_qlora.lora_linear_backward)
    def _(grad: Sequence[int], x: Sequence[int], *rest: Any, **_: Any) -> int:  # for A, B, and x if that needs one
        (r, inputs), outputs, needs_x = rest[4], grad[-1], rest[11]
        return int(2 * prod(x[:-1]) * (r * (inputs + 2 * outputs) + needs_x * inputs * (outputs + r)))
