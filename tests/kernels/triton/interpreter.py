"""Repairs to Triton's interpreter, for tests alone: it keeps bf16 as its bits and then computes with the bits.

Triton declines to mend it (triton-lang/triton#11584). Repaired: fp32 -> bf16 rounds to nearest even, tl.dot takes bf16.
Our kernels compute in fp32 and touch bf16 in loads, stores, casts and dots alone, so these are all they need.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

CONVERT = interpreter._convert_float
DOT = interpreter.InterpreterBuilder.create_dot


def _to_bf16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(bits.view(np.float32)), np.uint16(0x7FC0), rounded).astype(np.uint16)


def _from_bf16(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << np.uint32(16)


def repair() -> None:
    """Install the repairs in this process."""

    def convert_float(data: np.ndarray, source: Any, goal: Any, rounding: Any) -> np.ndarray:
        if (source, goal) == (tl.float32, tl.bfloat16):
            return _to_bf16(data)
        return (
            _from_bf16(data) if (source, goal) == (tl.bfloat16, tl.float32) else CONVERT(data, source, goal, rounding)
        )

    def create_dot(self: Any, a: Any, b: Any, c: Any, *options: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return DOT(self, a, b, c, *options)
        factors = [
            _from_bf16(operand.data).view(np.float32).reshape(operand.data.shape)
            if operand.dtype.scalar == tl.bfloat16
            else operand.data
            for operand in (a, b)
        ]
        return interpreter.TensorHandle(np.matmul(*factors) + c.data, c.dtype.scalar)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
