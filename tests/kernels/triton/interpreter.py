"""Repairs to Triton's interpreter, for tests alone: it keeps bf16 as its bits and then computes with the bits.

Triton declines to mend it (triton-lang/triton#11584). Repaired: fp32 -> bf16 rounds to nearest even, tl.dot takes bf16.
Our kernels compute in fp32 and touch bf16 in loads, stores, casts and dots alone, so these are all they need.

More of them take half of the time away, and change no result: a function that a kernel calls does not replace
`triton.language` again, which its kernel did; the numpy type of a type is looked up once; no check of overflows is
computed, whose result the interpreter drops.
"""

from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tests.emulator.types import bf16_to_float, float_to_bf16

CONVERT = interpreter._convert_float
DOT = interpreter.InterpreterBuilder.create_dot
PATCH = interpreter._patch_lang
NUMPY_TYPE = interpreter._get_np_dtype
NUMPY_TYPE_OF_SCALAR = cache(NUMPY_TYPE)  # pointers cannot be keys


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

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        return self.rewrite()(*arguments, **named)

    def numpy_type(kind: Any) -> np.dtype:
        return (NUMPY_TYPE if isinstance(kind.scalar, tl.pointer_type) else NUMPY_TYPE_OF_SCALAR)(kind.scalar)

    def patch(kernel: Any) -> Any:
        """For the kernel, and for the functions of Triton that it calls."""
        scope = PATCH(kernel)
        interpreter._patch_builtin(tl.core, interpreter.interpreter_builder, scope)
        interpreter._patch_lang_core(tl.core, scope)
        return scope

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter._patch_lang = patch
    interpreter.InterpretedFunction.__call__ = call
    interpreter._get_np_dtype = numpy_type
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
