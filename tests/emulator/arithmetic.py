"""Instructions that calculate. PTX ISA, "Integer Arithmetic", "Floating Point", "Comparison and Selection", "Logic and
Shift" and "Data Movement and Conversion Instructions" (mov, cvt, prmt).

`.approx` gives the exact value rounded to the type, a card one that is some ULP off. fma rounds once, through fp64.
"""

from collections.abc import Callable

import numpy as np

from tests.emulator.machine import Blocks, instruction, unknown
from tests.emulator.program import Instruction, Vector
from tests.emulator.types import FLOATS, TYPES, UNSIGNED, float_to_tf32, wider

Function = Callable[..., np.ndarray]


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, 1, b).astype(b.dtype)  # on a card there is any number
    return (a - np.fmod(a, b)) // b


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmod(a, np.where(b == 0, 1, b).astype(b.dtype))


def _largest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmax(a, b)  # of a number and NaN the number


def _smallest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.fmin(a, b)


def _or(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a | b


# name: the function of the operands, in the type that the name ends with
FUNCTIONS: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "div": _divide,
    "rem": _remainder,
    "max": _largest,
    "min": _smallest,
    "and": np.bitwise_and,
    "or": _or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "cnot": lambda a: (a == 0).astype(a.dtype),
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "rcp": lambda a: 1 / a,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "copysign": lambda a, b: np.copysign(b, a),
}
COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
ROUNDINGS: dict[str, Function] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
# Parts of a name that change nothing here: the nearest value is what numpy gives, approximations are exact.
PLAIN = {"rn", "approx", "full", "lo", "sync", "aligned", "relu", "sat", "ftz", "nan", "noftz", "rni", "xorsign"}


def _flushed(given: Instruction, values: np.ndarray) -> np.ndarray:
    """With .ftz a subnormal fp32 number is zero."""
    if "ftz" not in given.words or values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def _finished(given: Instruction, values: np.ndarray) -> np.ndarray:
    values = _flushed(given, values)
    if "relu" in given.words:
        values = np.fmax(values, values.dtype.type(0))
    if "sat" in given.words and values.dtype.kind == "f":
        values = np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype)
    return values


def _check_roundings(given: Instruction) -> None:
    for word in given.words[1:]:
        if word in ("rz", "rm", "rp") or (word == "sat" and given.type[0] == "s"):
            raise unknown(given, f".{word}")


@instruction(*FUNCTIONS)
def _calculate(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """d = f(a, b); max and min take three; add.f32.bf16: a is bf16."""
    _check_roundings(given)
    to, first, *others = given.operands
    types = [word for word in given.words if word in TYPES]
    value = _flushed(given, blocks.read(first, types[-1])).astype(_working(types[0]), copy=False)
    if not others:
        value = FUNCTIONS[given.words[0]](value)
    for operand in others:
        other = _flushed(given, blocks.read(operand, types[0]))
        result = FUNCTIONS[given.words[0]](value, other)
        if "NaN" in given.words:
            result = np.where(np.isnan(value) | np.isnan(other), value.dtype.type(np.nan), result)
        value = result.astype(value.dtype, copy=False)
    blocks.write(to, types[0], _finished(given, value), active)


def _working(type_name: str) -> type:
    kind = TYPES[type_name]
    return kind.decode(np.zeros(1, UNSIGNED[kind.bits])).dtype.type


def _product(blocks: Blocks, given: Instruction) -> tuple[np.ndarray, str]:
    """a * b, and its type: the low half, the high half, or all of it."""
    kind = given.type
    a, b = (blocks.read(operand, kind) for operand in given.operands[1:3])
    if "wide" in given.words:
        both = wider(kind)
        return a.astype(_working(both)) * b.astype(_working(both)), both
    if "hi" in given.words:
        bits = TYPES[kind].bits
        both = object if bits == 64 else _working(wider(kind))
        return (a.astype(both) * b.astype(both) >> bits).astype(a.dtype), kind
    return _flushed(given, a) * _flushed(given, b), kind


@instruction("mul")
def _multiply(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    _check_roundings(given)
    value, kind = _product(blocks, given)
    blocks.write(given.operands[0], kind, _finished(given, value), active)


@instruction("mad")
def _multiply_add(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    if given.type in FLOATS:
        return _fused(blocks, given, active)
    value, kind = _product(blocks, given)
    return blocks.write(given.operands[0], kind, value + blocks.read(given.operands[3], kind), active)


@instruction("fma")
def _fused(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """a * b + c, rounded once."""
    _check_roundings(given)
    a, b, c = (_flushed(given, blocks.read(operand, given.type)).astype(np.float64) for operand in given.operands[1:])
    value = (a * b + c).astype(_working(given.type))
    blocks.write(given.operands[0], given.type, _finished(given, value), active)


@instruction("shl", "shr")
def _shift(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """By 32 bits; by the width or more: nothing, or the sign, is left."""
    value, by = blocks.read(given.operands[1], given.type), blocks.read(given.operands[2], "u32")
    bits = TYPES[given.type].bits
    within = np.minimum(by, bits - 1).astype(value.dtype)
    shifted = value << within if given.words[0] == "shl" else value >> within
    if given.type[0] != "s":
        shifted = np.where(by < bits, shifted, 0).astype(value.dtype)
    blocks.write(given.operands[0], given.type, shifted, active)


@instruction("shf")
def _funnel(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """Shift of b:a, 64 bits, of which the high (.l) or low (.r) half is the result."""
    low, high, by = (blocks.read(operand, "u32").astype(np.uint64) for operand in given.operands[1:])
    by = np.minimum(by, 32).astype(np.uint64) if "clamp" in given.words else by & np.uint64(31)
    both = high << np.uint64(32) | low
    value = both << by >> np.uint64(32) if "l" in given.words else both >> by
    blocks.write(given.operands[0], "u32", value.astype(np.uint32), active)


@instruction("lop3")
def _any_logic(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """Any function of three bits: bit 4a + 2b + c of the table is its value."""
    a, b, c = (blocks.read(operand, "u32") for operand in given.operands[1:4])
    table, value = given.operands[4].bits, np.zeros_like(a)
    for number in range(8):
        if table >> number & 1:
            value |= (a if number & 4 else ~a) & (b if number & 2 else ~b) & (c if number & 1 else ~c)
    blocks.write(given.operands[0], "u32", value, active)


@instruction("popc")
def _count_bits(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    value = blocks.read(given.operands[1], given.type)
    bits = np.unpackbits(np.ascontiguousarray(value).view(np.uint8)).reshape(len(value), -1)
    blocks.write(given.operands[0], "u32", bits.sum(1).astype(np.uint32), active)


@instruction("clz", "bfind")
def _highest_bit(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """clz: zeros before the highest 1; bfind: its place, or all ones."""
    value, bits = blocks.read(given.operands[1], given.type), TYPES[given.type].bits
    value = np.where(value < 0, ~value, value) if given.type[0] == "s" else value
    place = np.full(len(value), -1, np.int32)
    for number in range(bits):
        place[(value >> value.dtype.type(number) & value.dtype.type(1)).astype(bool)] = number
    if given.words[0] == "clz" or "shiftamt" in given.words:
        zeros = np.where(place < 0, bits if given.words[0] == "clz" else -1, bits - 1 - place)
        return blocks.write(given.operands[0], "s32", zeros.astype(np.int32), active)
    return blocks.write(given.operands[0], "s32", place, active)


@instruction("brev")
def _reverse_bits(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    value = blocks.read(given.operands[1], given.type)
    bits = np.unpackbits(np.ascontiguousarray(value).view(np.uint8), bitorder="little").reshape(len(value), -1)
    packed = np.packbits(np.ascontiguousarray(bits[:, ::-1]), axis=1, bitorder="little")
    blocks.write(given.operands[0], given.type, np.ascontiguousarray(packed).view(value.dtype)[:, 0], active)


@instruction("bfe")
def _extract(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
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


@instruction("bfi")
def _insert(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """The low `length` bits of a, at `start`, in b."""
    a, b = (blocks.read(operand, given.type).astype(np.uint64) for operand in given.operands[1:3])
    start, length = (blocks.read(operand, "u32").astype(np.uint64) & np.uint64(255) for operand in given.operands[3:])
    ones = np.where(length < 64, (np.uint64(1) << np.minimum(length, 63)) - np.uint64(1), ~np.uint64(0))
    mask = np.where(start < 64, ones << np.minimum(start, 63), np.uint64(0))
    value = b & ~mask | a << np.minimum(start, 63) & mask
    blocks.write(given.operands[0], given.type, value.astype(_working(given.type)), active)


@instruction("prmt")
def _permute(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
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


@instruction("setp", "set")
def _compare(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """setp.lt.and.f32 p|q, a, b, c: p = (a < b) and c, q = not (a < b) and c. ltu: also true with NaN."""
    kind, comparison = given.type, given.words[1]
    a, b = (blocks.read(operand, kind) for operand in given.operands[1:3])
    nan = np.isnan(a) | np.isnan(b) if kind in FLOATS else np.zeros(len(a), bool)
    if comparison in ("nan", "num"):
        value = nan if comparison == "nan" else ~nan
    elif comparison in COMPARISONS:
        value = COMPARISONS[comparison](a, b) & ~nan
    else:
        value = COMPARISONS[comparison[:-1]](a, b) | nan
    values = [value, ~value]
    if given.words[2] in ("and", "or", "xor"):
        other = blocks.read(given.operands[3], "pred")
        values = [getattr(np, f"logical_{given.words[2]}")(each, other) for each in values]
    if given.words[0] == "set":
        ones = {"f32": np.float32(1)}.get(given.words[-2], np.uint32(0xFFFFFFFF))
        return blocks.write(given.operands[0], given.words[-2], np.where(values[0], ones, ones.dtype.type(0)), active)
    for to, each in zip(blocks.parts(given.operands[0]), values, strict=False):
        blocks.write(to, "pred", each, active)
    return None


@instruction("selp")
def _select(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    kind = f"b{TYPES[given.type].bits}"
    a, b = (blocks.read(operand, kind) for operand in given.operands[1:3])
    blocks.write(given.operands[0], kind, np.where(blocks.read(given.operands[3], "pred"), a, b), active)


@instruction("mov")
def _move(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
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


@instruction("cvta")
def _address_space(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """Global addresses are generic ones."""
    if "global" not in given.words:
        raise unknown(given)
    blocks.write(given.operands[0], "u64", blocks.read(given.operands[1], "u64"), active)


@instruction("cvt")
def _convert(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """cvt.rn.bf16x2.f32 d, high, low; integers extend or are cut, floats to integers are clamped."""
    to, of = given.words[-2:]
    if any(word in ("rz", "rm", "rp", "rs") for word in given.words):
        raise unknown(given, "only to nearest is")
    if to.endswith("x2") and of == "f32":
        values = np.stack([blocks.read(operand, of) for operand in reversed(given.operands[1:3])], 1).ravel()
    else:
        values = blocks.read(given.operands[1], of)
    values = _flushed(given, values)
    goal = _working(to)
    if to == "tf32":
        values = float_to_tf32(values)
    elif np.issubdtype(goal, np.integer) and values.dtype.kind == "f":
        rounding = next((word for word in given.words if word in ROUNDINGS), None)
        if rounding is None:
            raise unknown(given, "without a rounding")
        rounded = np.nan_to_num(ROUNDINGS[rounding](values.astype(np.float64)), posinf=np.inf, neginf=-np.inf)
        values = _clamped(rounded, goal)
    elif rounding := next((word for word in given.words if word in ROUNDINGS), None):
        values = ROUNDINGS[rounding](values)
    elif "sat" in given.words and values.dtype.kind in "iu":
        limits = np.iinfo(goal)
        values = np.array([min(max(int(v), limits.min), limits.max) for v in values], object)
    values = values.astype(goal)
    blocks.write(given.operands[0], to, _finished(given, values) if values.dtype.kind == "f" else values, active)


def _clamped(values: np.ndarray, goal: type) -> np.ndarray:
    limits = np.iinfo(goal)
    inside = np.clip(values, float(limits.min), float(limits.max))
    result = inside.astype(goal)
    # The largest integer of 64 bits is no float.
    return np.where(inside >= float(limits.max), limits.max, result).astype(goal)
