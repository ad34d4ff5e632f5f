"""Repairs to Triton's interpreter, for tests alone: it keeps bf16 as its bits and then computes with the bits.

Triton declines to mend it (triton-lang/triton#11584). Repaired: fp32 -> bf16 rounds to nearest even, tl.dot takes bf16.
Our kernels compute in fp32 and touch bf16 in loads, stores, casts and dots alone, so these are all they need.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tests.emulator.types import bf16_to_float, float_to_bf16

CONVERT = interpreter._convert_float
DOT = interpreter.InterpreterBuilder.create_dot


def _as_floats(data: np.ndarray) -> np.ndarray:
    return bf16_to_float(np.ascontiguousarray(data).view(np.uint16))


def repair() -> None:
    """Install the repairs in this process."""

    def convert_float(data: np.ndarray, source: Any, goal: Any, rounding: Any) -> np.ndarray:
        if (source, goal) == (tl.float32, tl.bfloat16):
            return float_to_bf16(np.ascontiguousarray(data).view(np.float32))
        if (source, goal) == (tl.bfloat16, tl.float32):
            return _as_floats(data).view(np.uint32)
        return CONVERT(data, source, goal, rounding)

    def create_dot(self: Any, a: Any, b: Any, c: Any, *options: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return DOT(self, a, b, c, *options)
        factors = (_as_floats(each.data) if each.dtype.scalar == tl.bfloat16 else each.data for each in (a, b))
        return interpreter.TensorHandle(np.matmul(*factors) + c.data, c.dtype.scalar)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
