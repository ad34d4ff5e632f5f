"""Instructions between the threads of a warp. PTX ISA, "Parallel Synchronization and Communication Instructions"."""

import numpy as np

from tests.emulator.machine import WARP, instruction
from tests.emulator.types import TYPES, UNSIGNED

LANE = np.arange(WARP)
REDUCTIONS = {"add": np.add, "max": np.maximum}


@instruction("shfl")
def _shuffle(blocks, given, active):
    """shfl.sync.mode d, a, b, c, mask: a of the lane that mode and b name, if it is in the segment."""
    blocks.whole_warps(given, active)
    value = blocks.read(given.operands[1], "u32").reshape(-1, WARP)
    by, c = (blocks.read(operand, "u32").reshape(-1, WARP).astype(np.int64) for operand in given.operands[2:4])
    segment, clamp = c >> 8 & 31, c & 31
    lowest = LANE & segment
    highest = lowest | clamp & ~segment & 31
    if given.words[2] == "up":
        wanted = LANE - by
        inside = wanted >= highest
    else:
        wanted = {"bfly": LANE ^ by, "idx": lowest | by & ~segment & 31}[given.words[2]]
        inside = wanted <= highest
    source = np.where(inside, wanted, LANE)
    blocks.write(given.operands[0], "b32", np.take_along_axis(value, source, 1).ravel(), active)


@instruction("redux")
def _reduce(blocks, given, active):
    """The sum, ... over the lanes of a warp."""
    blocks.whole_warps(given, active)
    value = blocks.read(given.operands[1], given.type).reshape(-1, WARP)
    total = REDUCTIONS[given.words[2]].reduce(value, axis=1).astype(value.dtype)
    blocks.write(given.operands[0], given.type, np.repeat(total, WARP), active)


@instruction("bar", "createpolicy")
def _nothing(blocks, given, active):
    """bar.warp.sync: the threads of a warp are executed together. Loads do not read the policy of a cache."""


def registers_as(blocks, operands, type_name):
    """The parts of 32-bit registers as values [threads, registers, parts]."""
    kind = TYPES[type_name]
    arrays = [np.ascontiguousarray(blocks.read(operand, "b32")).view(UNSIGNED[kind.bits]) for operand in operands]
    return np.stack([kind.decode(array).reshape(blocks.n, -1) for array in arrays], 1)
