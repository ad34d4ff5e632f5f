"""The types of PTX as numpy arrays. PTX ISA, "Fundamental Types", "Alternate Floating-Point Data Formats".

A register is an array of unsigned integers with an entry for each thread. `decode` makes values that numpy calculates
with, and `encode` makes bits again. Of a packed type (f16x2, f32x2) the values of a thread follow each other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

UNSIGNED = {1: bool, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


@dataclass(frozen=True)
class Type:
    """Attributes:
    bits: Of a value in a register, all components together.
    decode: Bits [threads] -> values [threads x components].
    encode: The same back, rounded to nearest even.
    """

    bits: int
    decode: Callable[[np.ndarray], np.ndarray]
    encode: Callable[[np.ndarray], np.ndarray]


def bf16_to_float(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values):
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(values), 0x7FFF, bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def _viewed(bits, kind):
    return Type(
        bits,
        lambda array: np.ascontiguousarray(array).view(kind),
        lambda values: np.ascontiguousarray(values, kind).view(UNSIGNED[bits]),
    )


def _packed(count, part):
    """Several values in one register, the first in the lowest bits."""
    bits = count * part.bits
    return Type(
        bits,
        lambda array: part.decode(np.ascontiguousarray(array).view(UNSIGNED[part.bits])),
        lambda values: np.ascontiguousarray(part.encode(values)).view(UNSIGNED[bits]),
    )


BF16 = Type(16, bf16_to_float, float_to_bf16)
TYPES = {
    "pred": Type(1, lambda array: array, lambda values: np.asarray(values, bool)),
    **{f"{kind}{bits}": _viewed(bits, UNSIGNED[bits]) for kind in "bu" for bits in SIGNED},
    **{f"s{bits}": _viewed(bits, SIGNED[bits]) for bits in SIGNED},
    "f16": _viewed(16, np.float16),
    "bf16": BF16,
    "f32": _viewed(32, np.float32),
}
TYPES |= {f"{name}x2": _packed(2, TYPES[name]) for name in ("f16", "bf16", "f32", "s16")}


def wider(name):
    """The integer type of twice the bits."""
    return f"{name[0]}{2 * int(name[1:])}"
