"""Loads, stores, atomic operations and asynchronous copies. PTX ISA, "Data Movement and Conversion Instructions"."""

from dataclasses import dataclass

import numpy as np

from tests.emulator.machine import instruction, unknown
from tests.emulator.memory import MEMORY
from tests.emulator.program import Constant
from tests.emulator.types import TYPES, UNSIGNED


def _is_shared(given):
    space = given.words[1].split("::")[0]
    if space not in ("global", "shared"):
        raise unknown(given, "only global and shared memory are")
    return space == "shared"


def _order(blocks, given, active):
    """.release and .acquire order what other blocks stored."""
    words, actors = set(given.words), blocks.actors(active)
    for warp in np.unique(actors.warps):
        thread = int((actors.warps == warp).argmax())
        if words & {"acq_rel", "release"}:
            blocks.memory.release(int(actors.blocks[thread]), int(warp), int(actors.epochs[thread]))
        if words & {"acq_rel", "acquire"}:
            blocks.memory.acquire(int(actors.blocks[thread]))


@instruction("ld")
def _load(blocks, given, active):
    to, of = blocks.parts(given.operands[0]), given.operands[1]
    kind = TYPES[given.type]
    if given.words[1] == "param":
        value = blocks.parameters[of.base.name] >> 8 * of.offset & (1 << kind.bits) - 1
        values = kind.decode(np.full(blocks.n, value, np.uint64).astype(UNSIGNED[kind.bits]))
        return blocks.write(to[0], given.type, values, active)
    size = kind.bits // 8 * len(to)
    if _is_shared(given):
        places = blocks.shared.places(blocks.address(of, "u32")[active], size, blocks.block[active])
        data = blocks.shared.load(places, blocks.actors(active))
    else:
        at = blocks.address(of, "u64")[active]
        data = MEMORY[blocks.memory.access("load", at, size, blocks.actors(active))]
    data = np.ascontiguousarray(data).view(UNSIGNED[kind.bits])
    for number, register in enumerate(to):
        bits = np.zeros(blocks.n, data.dtype)
        bits[active] = data[:, number]
        blocks.write(register, given.type, kind.decode(bits), active)
    return None


@instruction("st")
def _store(blocks, given, active):
    to, of = given.operands[0], blocks.parts(given.operands[1])
    kind = TYPES[given.type]
    bits = np.stack([blocks.read(part, f"b{kind.bits}")[active] for part in of], 1)
    data = np.ascontiguousarray(bits).view(np.uint8).reshape(len(bits), -1)
    if _is_shared(given):
        places = blocks.shared.places(blocks.address(to, "u32")[active], data.shape[1], blocks.block[active])
        blocks.shared.store(places, data, blocks.actors(active))
    else:
        at = blocks.address(to, "u64")[active]
        MEMORY[blocks.memory.access("store", at, data.shape[1], blocks.actors(active))] = data


@instruction("atom")
def _atomic(blocks, given, active):
    """atom.global.gpu.sem.add.type d, [a], b: one thread after the other."""
    to, address, operand = given.operands
    kind = TYPES[given.type]
    if given.words[1:3] != ["global", "gpu"] or given.words[4] != "add":
        raise unknown(given)
    at = blocks.address(address, "u64")
    places = blocks.memory.access("atomic", at[active], kind.bits // 8, blocks.actors(active))
    value = blocks.read(operand, given.type)
    before = np.zeros(blocks.n, UNSIGNED[kind.bits])
    for thread, place in zip(np.flatnonzero(active), places, strict=True):
        before[thread] = MEMORY[place].view(before.dtype)[0]
        old = kind.decode(before[thread : thread + 1])
        MEMORY[place] = kind.encode(old + value[thread]).view(np.uint8)
    _order(blocks, given, active)
    blocks.write(to, given.type, kind.decode(before), active)


@instruction("fence")
def _fence(blocks, given, active):
    """fence.proxy.async: shared memory, as asynchronous products read it."""
    if given.words[1] != "proxy":
        raise unknown(given)
    blocks.shared.fence(blocks.warps[active])


@dataclass
class Copy:
    """A cp.async that was issued, until a thread has waited for it.

    Attributes:
        left: A mask of the threads that have not waited.
        commits: How many groups each block had committed before.
        places, data: What goes where in shared memory, a row for each thread.
    """

    left: np.ndarray
    commits: np.ndarray
    places: np.ndarray
    data: np.ndarray


class Copies:
    """The asynchronous copies of the blocks. Their bytes arrive as late as they may: when the thread waits."""

    def __init__(self, blocks):
        self.pending = []
        self.commits = np.zeros(blocks.count, np.int64)


@instruction("cp")
def _copy(blocks, given, active):
    """cp.async.ca.shared.global [to], [from], size, count: bytes after `count` are 0."""
    if given.words[1] != "async" or "bulk" in given.words:
        raise unknown(given)
    copies = blocks.state.setdefault("cp.async", Copies(blocks))
    if given.words[2] in ("commit_group", "wait_group"):
        here = active.reshape(blocks.count, blocks.threads)
        if (here.any(1) != here.all(1)).any():
            raise unknown(given, "for a part of a block")
        if given.words[2] == "commit_group":
            copies.commits[here.all(1)] += 1
        else:
            _wait(blocks, copies, here.all(1), given.operands[0].bits)
        return
    size = given.operands[2].bits
    count = given.operands[3] if len(given.operands) > 3 else Constant(size)
    counts = blocks.read(count, "u32")
    at = blocks.address(given.operands[1], "u64")
    data = np.zeros((blocks.n, size), np.uint8)
    for number in np.unique(counts[active]):
        some = active & (counts == number)
        if number:
            data[some, :number] = MEMORY[blocks.memory.access("load", at[some], int(number), blocks.actors(some))]
    places = np.zeros((blocks.n, size), np.int64)
    places[active] = blocks.shared.places(blocks.address(given.operands[0], "u32")[active], size, blocks.block[active])
    blocks.shared.begin_copy(places[active], blocks.actors(active))
    copies.pending.append(Copy(active.copy(), copies.commits.copy(), places, data))


def _wait(blocks, copies, here, left):
    """Until at most `left` groups are on their way."""
    for copy in copies.pending:
        due = (here & (copy.commits < copies.commits - left))[blocks.block] & copy.left
        if due.any():
            actors = blocks.actors(due)
            blocks.shared.store(copy.places[due], copy.data[due], actors)
            copy.left &= ~due
    copies.pending = [copy for copy in copies.pending if copy.left.any()]
