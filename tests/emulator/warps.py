"""Instructions between the threads of a warp. PTX ISA, "Parallel Synchronization and Communication Instructions"."""

import numpy as np

from tests.emulator.machine import WARP, Blocks, instruction, unknown
from tests.emulator.program import Instruction
from tests.emulator.types import TYPES, UNSIGNED

LANE = np.arange(WARP)
REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("shfl")
def _shuffle(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """shfl.sync.mode d|p, a, b, c, mask: a of the lane that mode and b name; p: whether it is in the segment."""
    blocks.whole_warps(given, active)
    to = blocks.parts(given.operands[0])
    value = blocks.read(given.operands[1], "u32").reshape(-1, WARP)
    by, c = (blocks.read(operand, "u32").reshape(-1, WARP).astype(np.int64) for operand in given.operands[2:4])
    segment, clamp = c >> 8 & 31, c & 31
    lowest = LANE & segment
    highest = lowest | clamp & ~segment & 31
    mode = given.words[2]
    if mode == "up":
        wanted = LANE - by
        inside = wanted >= highest
    else:
        wanted = {"down": LANE + by, "bfly": LANE ^ by, "idx": lowest | by & ~segment & 31}[mode]
        inside = wanted <= highest
    source = np.where(inside, wanted, LANE)
    blocks.write(to[0], "b32", np.take_along_axis(value, source, 1).ravel(), active)
    if len(to) > 1:
        blocks.write(to[1], "pred", inside.ravel(), active)


@instruction("redux")
def _reduce(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """The sum, ... over the lanes of a warp."""
    blocks.whole_warps(given, active)
    value = blocks.read(given.operands[1], given.type).reshape(-1, WARP)
    total = REDUCTIONS[given.words[2]].reduce(value, axis=1).astype(value.dtype)
    blocks.write(given.operands[0], given.type, np.repeat(total, WARP), active)


@instruction("vote")
def _vote(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """Whether all or any lanes have the predicate, or a bit for each of them."""
    blocks.whole_warps(given, active)
    votes = blocks.read(given.operands[1], "pred").reshape(-1, WARP)
    mode = given.words[2]
    if mode == "ballot":
        ballots = np.packbits(votes, axis=1, bitorder="little").view(np.uint32)[:, 0]
        return blocks.write(given.operands[0], "b32", np.repeat(ballots, WARP), active)
    if mode not in ("all", "any"):
        raise unknown(given)
    return blocks.write(given.operands[0], "pred", np.repeat(getattr(np, mode)(votes, axis=1), WARP), active)


@instruction("activemask")
def _active_mask(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    ballots = np.packbits(active.reshape(-1, WARP), axis=1, bitorder="little").view(np.uint32)[:, 0]
    blocks.write(given.operands[0], "b32", np.repeat(ballots, WARP), active)


@instruction("elect")
def _elect(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """elect.sync d|p, mask: the lowest lane is chosen."""
    blocks.whole_warps(given, active)
    lane, chosen = blocks.parts(given.operands[0])
    blocks.write(lane, "b32", np.zeros(blocks.n, np.uint32), active)
    blocks.write(chosen, "pred", np.tile(LANE == 0, blocks.n // WARP), active)


@instruction("bar", "nanosleep", "createpolicy", "prefetch", "griddepcontrol", "setmaxnreg")
def _nothing(blocks: Blocks, given: Instruction, active: np.ndarray) -> None:
    """bar.warp.sync: the threads of a warp are executed together. The others are hints.

    A policy of the cache is passed on as a number.
    """
    if given.words[0] == "createpolicy":
        blocks.write(given.operands[0], "b64", np.zeros(blocks.n, np.uint64), active)


def registers_as(blocks: Blocks, operands, type_name: str) -> np.ndarray:
    """The parts of 32-bit registers as values [threads, registers, parts]."""
    kind = TYPES[type_name]
    arrays = [np.ascontiguousarray(blocks.read(operand, "b32")).view(UNSIGNED[kind.bits]) for operand in operands]
    return np.stack([kind.decode(array).reshape(blocks.n, -1) for array in arrays], 1)
