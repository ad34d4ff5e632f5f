"""Instructions that calculate. PTX ISA, "Integer Arithmetic", "Floating Point", "Comparison and Selection", "Logic and
Shift" and "Data Movement and Conversion Instructions" (mov, cvt, prmt).

fma rounds once, through fp64.
"""

import numpy as np

from tests.emulator.machine import instruction, unknown
from tests.emulator.program import Vector
from tests.emulator.types import TYPES, UNSIGNED, wider


def _divide(a, b):
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, 1, b).astype(b.dtype)  # on a card there is any number
    return (a - np.fmod(a, b)) // b


# name: the function of the operands, in the type that the name ends with
FUNCTIONS = {
    "add": np.add,
    "sub": np.subtract,
    "div": _divide,
    "max": np.fmax,  # of a number and NaN the number
    "min": np.fmin,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
# Other parts of a name would change the value, as .ftz, .sat or .rz.
PLAIN = {"rn", "lo", "wide"}


def _check(given):
    if others := [word for word in given.words[1:] if word not in PLAIN and word not in TYPES]:
        raise unknown(given, f".{others[0]}")


@instruction(*FUNCTIONS)
def _calculate(blocks, given, active):
    """d = f(a, b); max and min take three. In add.f32.bf16 a is bf16, and the others fp32."""
    _check(given)
    to, first, *others = given.operands
    kind, *of_first = (word for word in given.words if word in TYPES)
    function = FUNCTIONS[given.words[0]]
    value = blocks.read(first, *(of_first or [kind])).astype(_working(kind), copy=False)
    dtype = value.dtype
    if not others:
        value = function(value)
    for operand in others:
        value = function(value, blocks.read(operand, kind))
    blocks.write(to, kind, value.astype(dtype, copy=False), active)


def _working(type_name):
    kind = TYPES[type_name]
    return kind.decode(np.zeros(1, UNSIGNED[kind.bits])).dtype.type


@instruction("mul", "mad")
def _multiply(blocks, given, active):
    """a * b, or a * b + c: the low half, or of .wide all of it."""
    _check(given)
    a, b = (blocks.read(operand, given.type) for operand in given.operands[1:3])
    kind = given.type
    if "wide" in given.words:
        kind = wider(kind)
    value = a.astype(_working(kind)) * b.astype(_working(kind))
    if given.words[0] == "mad":
        value += blocks.read(given.operands[3], kind)
    blocks.write(given.operands[0], kind, value, active)


@instruction("fma")
def _fused(blocks, given, active):
    """a * b + c, rounded once."""
    _check(given)
    a, b, c = (blocks.read(operand, given.type).astype(np.float64) for operand in given.operands[1:])
    blocks.write(given.operands[0], given.type, (a * b + c).astype(_working(given.type)), active)


@instruction("shl", "shr")
def _shift(blocks, given, active):
    """By 32 bits; by the width or more: nothing, or the sign, is left."""
    value, by = blocks.read(given.operands[1], given.type), blocks.read(given.operands[2], "u32")
    bits = TYPES[given.type].bits
    within = np.minimum(by, bits - 1).astype(value.dtype)
    shifted = value << within if given.words[0] == "shl" else value >> within
    if given.type[0] != "s":
        shifted = np.where(by < bits, shifted, 0).astype(value.dtype)
    blocks.write(given.operands[0], given.type, shifted, active)


@instruction("popc")
def _count_bits(blocks, given, active):
    value = blocks.read(given.operands[1], given.type)
    bits = np.unpackbits(np.ascontiguousarray(value).view(np.uint8)).reshape(len(value), -1)
    blocks.write(given.operands[0], "u32", bits.sum(1).astype(np.uint32), active)


@instruction("bfe")
def _extract(blocks, given, active):
    """`length` bits from `start` on; of a signed type the highest of them is repeated."""
    signed, bits = given.type[0] == "s", TYPES[given.type].bits
    value = blocks.read(given.operands[1], given.type).astype(np.int64 if signed else np.uint64)
    start, length = (blocks.read(operand, "u32") & np.uint32(255) for operand in given.operands[2:])
    kind = value.dtype.type
    shifted = value >> np.minimum(start, 63).astype(kind)
    shifted = shifted if signed else np.where(start < bits, shifted, kind(0))
    left = (64 - np.minimum(length, 64)).astype(kind)  # to the highest bits and back
    field = np.where(length > 0, shifted << np.minimum(left, kind(63)) >> np.minimum(left, kind(63)), kind(0))
    blocks.write(given.operands[0], given.type, field.astype(_working(given.type)), active)


@instruction("prmt")
def _permute(blocks, given, active):
    """Four of the eight bytes of a and b; bit 3 of a selector repeats the sign of the byte."""
    if given.type != "b32" or len(given.words) > 2:
        raise unknown(given, "only without a mode")
    a, b, selectors = (blocks.read(operand, "u32").astype(np.uint64) for operand in given.operands[1:])
    both, value = a | b << np.uint64(32), np.zeros(blocks.n, np.uint64)
    for byte in range(4):
        selector = selectors >> np.uint64(4 * byte) & np.uint64(15)
        chosen = both >> (selector & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(chosen & np.uint64(128), 255, 0).astype(np.uint64)
        value |= np.where(selector & np.uint64(8), sign, chosen) << np.uint64(8 * byte)
    blocks.write(given.operands[0], "u32", value.astype(np.uint32), active)


@instruction("setp")
def _compare(blocks, given, active):
    """setp.lt.f32 p, a, b: false with NaN; setp.nan: whether one is NaN."""
    comparison, kind = given.words[1], given.type
    if len(given.words) != 3 or (comparison == "ne" and kind[0] == "f"):
        raise unknown(given)
    a, b = (blocks.read(operand, kind) for operand in given.operands[1:])
    if comparison == "nan":
        value = np.isnan(a) | np.isnan(b)
    else:
        value = COMPARISONS[comparison](a, b)
    blocks.write(given.operands[0], "pred", value, active)


@instruction("selp")
def _select(blocks, given, active):
    kind = f"b{TYPES[given.type].bits}"
    a, b = (blocks.read(operand, kind) for operand in given.operands[1:3])
    blocks.write(given.operands[0], kind, np.where(blocks.read(given.operands[3], "pred"), a, b), active)


@instruction("mov")
def _move(blocks, given, active):
    """Also from and to {low, high}."""
    to, of = given.operands
    kind = given.type if given.type == "pred" else f"b{TYPES[given.type].bits}"
    if isinstance(to, Vector):
        part = f"b{TYPES[kind].bits // len(to.parts)}"
        values = np.ascontiguousarray(blocks.read(of, kind)).view(UNSIGNED[TYPES[part].bits]).reshape(blocks.n, -1)
        for number, operand in enumerate(to.parts):
            blocks.write(operand, part, values[:, number], active)
    elif isinstance(of, Vector):
        part = f"b{TYPES[kind].bits // len(of.parts)}"
        values = np.stack([blocks.read(operand, part) for operand in of.parts], 1)
        blocks.write(to, kind, values.view(UNSIGNED[TYPES[kind].bits])[:, 0], active)
    else:
        blocks.write(to, kind, blocks.read(of, kind), active)


@instruction("cvt")
def _convert(blocks, given, active):
    """cvt.rn.bf16x2.f32 d, high, low; integers extend or are cut, floats to integers are cut and clamped."""
    to, of = given.words[-2:]
    goal = _working(to)
    if to.endswith("x2") and of == "f32":
        values = np.stack([blocks.read(operand, of) for operand in reversed(given.operands[1:3])], 1).ravel()
    else:
        values = blocks.read(given.operands[1], of)
    is_cut = np.issubdtype(goal, np.integer) and values.dtype.kind == "f"
    if given.words[1:-2] not in ([["rzi"]] if is_cut else [[], ["rn"]]):
        raise unknown(given, "another rounding")
    if is_cut:
        limits = np.iinfo(goal)
        values = np.clip(np.nan_to_num(np.trunc(values.astype(np.float64))), limits.min, limits.max)
    blocks.write(given.operands[0], to, values.astype(goal), active)
