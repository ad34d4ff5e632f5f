"""Executes a PTX program, some blocks at a time: a register is an array with an entry for each thread of these blocks.

Threads that diverge are executed in turns. Within a block those at the lowest place in the code go first, so that they
meet again; of the blocks that one that has done least, so that a block may wait for another one. PTX ISA, "SIMT
Architecture". `INSTRUCTIONS` has a function for the first part of each name; it gets the blocks, the instruction and a
mask of the threads that execute it.
"""

from itertools import pairwise, product

import numpy as np

from tests.emulator.memory import Actors, Fault, GlobalMemory, SharedMemory
from tests.emulator.program import Constant, Register, Symbol, Vector
from tests.emulator.types import TYPES, UNSIGNED

WARP = 32
THREADS = 4096  # executed together, at most
STEPS = 10**6  # pieces of straight code in which blocks must come to their end
NAN = 0xFFFFFFFFFFFFDEAD  # what a register holds before it is written: NaN as a float of 16, 32 and 64 bits
INSTRUCTIONS = {}


class UnknownInstruction(Exception):
    """An instruction is not known, or what is around it."""


def instruction(*names):
    def enter(execute):
        INSTRUCTIONS.update(dict.fromkeys(names, execute))
        return execute

    return enter


def unknown(given, what=""):
    return UnknownInstruction(f"PTX instruction {given.name} is not known{what and ', '}{what}: {given.text}")


def run(program, grid, threads, shared, values, ranges):
    """Execute all blocks of a launch.

    Args:
        grid: Number of blocks in each dimension.
        threads: Of a block; a multiple of 32.
        shared: Bytes of dynamic shared memory of a block.
        values: Bits of the parameters, in their order.
        ranges: [begin, end) addresses that the kernel may touch.
    """
    memory = GlobalMemory(ranges)
    parameters = dict(zip(program.parameters, values, strict=True))
    places = [(x, y, z) for z, y, x in product(*map(range, reversed(grid)))]
    together = max(1, THREADS // threads)
    for first in range(0, len(places), together):
        blocks = Blocks(program, grid, places[first : first + together], first, threads, shared, parameters, memory)
        with np.errstate(all="ignore"):
            blocks.run()


class Blocks:
    """Some blocks of a launch while they run.

    Attributes:
        n: Threads of all these blocks.
        block: The number of each thread's block among these.
        every: A mask of all threads. Instructions get it, the very array, if no thread is left out.
        state: Of asynchronous instructions; belongs to their modules.
    """

    def __init__(self, program, grid, places, first, threads, shared, parameters, memory):
        self.program, self.parameters, self.memory = program, parameters, memory
        self.count, self.threads, self.n = len(places), threads, len(places) * threads
        self.every = np.ones(self.n, bool)
        self.block = np.repeat(np.arange(self.count), threads)
        self.warps = (first * threads + np.arange(self.n)) // WARP
        self.first = first
        self.epochs = np.zeros(self.count, np.int64)
        self.shared = SharedMemory(shared, self.count, program.shared_unit)
        self.state = {}
        self.registers = {}
        thread = np.tile(np.arange(threads), self.count)
        self._special = {"%tid.x": thread}
        for axis, name in enumerate("xyz"):
            self._special[f"%ctaid.{name}"] = np.repeat([place[axis] for place in places], threads)
            self._special[f"%nctaid.{name}"] = 0 * thread + grid[axis]
        self._constants = {}

    def run(self):
        instructions, leaders = self.program.instructions, self.program.leaders
        following = dict(pairwise(leaders))
        end, at = len(instructions), np.zeros(self.n, np.int64)
        steps = np.zeros(self.count, np.int64)
        while True:
            lowest = at.reshape(self.count, self.threads).min(1)
            waiting = np.flatnonzero(lowest < end)
            if not len(waiting):
                return
            now = int(lowest[waiting[steps[waiting].argmin()]])
            chosen = lowest == now
            steps[chosen] += 1
            if steps.max() > STEPS:
                raise Fault(f"no end after {STEPS} steps, at: {instructions[now].text}")
            here = (at == now) & chosen[self.block]
            here = self.every if here.all() else here
            at[here] = following[now]
            for given in instructions[now : following[now]]:
                self._execute(given, here, at)

    def _execute(self, given, here, at):
        active = here
        if given.guard:
            guard = self.read(given.guard, "pred")
            active = here & (~guard if given.negated else guard)
            active = self.every if active.all() else active
        kind = given.words[0]
        if kind == "ret":
            at[active] = len(self.program.instructions)
        elif kind == "bra":
            at[active] = self.program.labels[given.operands[-1].name]
        elif given.name == "bar.sync":
            self._barrier(given, here, at)
        elif active is self.every or active.any():
            try:
                INSTRUCTIONS[kind](self, given, active)
            except Fault as fault:
                raise Fault(f"{fault}: {given.text}") from None
            except UnknownInstruction:
                raise
            except Exception as error:
                raise unknown(given, f"{type(error).__name__}: {error}") from error

    def _barrier(self, given, here, at):
        """All threads of a block that have not ended must be here. PTX ISA, "bar"."""
        if given.operands != [Constant(0)]:
            raise unknown(given, "only the barrier of all threads is")
        blocks = np.unique(self.block[here])
        missing = np.isin(self.block, blocks) & ~here & (at < len(self.program.instructions))
        if missing.any():
            raise Fault(f"{missing.sum()} threads of a block do not reach a barrier: {given.text}")
        self.epochs[blocks] += 1

    # What instructions use.

    def actors(self, threads):
        """Who the threads (a mask) are, for the memories."""
        block = self.block[threads]
        return Actors(self.first + block, self.warps[threads], self.epochs[block])

    def whole_warps(self, given, active):
        """Instructions for all threads of a warp may not be executed by a part of it."""
        if active is not self.every:
            warps = active.reshape(-1, WARP)
            if (warps.any(1) != warps.all(1)).any():
                raise Fault("only a part of a warp executes an instruction for all of it")

    def read(self, operand, type_name):
        """The values of all threads."""
        kind = TYPES[type_name]
        if isinstance(operand, Register) and operand.name not in self._special:
            return kind.decode(self._as_bits(self.bits(operand.name), kind.bits))
        key = operand, type_name
        if key not in self._constants:
            array = self._special[operand.name] if isinstance(operand, Register) else self._constant(operand)
            self._constants[key] = kind.decode(array.astype(UNSIGNED[kind.bits]))
        return self._constants[key]

    def write(self, operand, type_name, values, active):
        """Values of all threads; those of the active ones are kept."""
        if operand.name == "_":
            return
        kind = UNSIGNED[self.program.width(operand.name)]
        bits = TYPES[type_name].encode(values)
        if bits.dtype != kind:
            signed = bits.view(f"i{bits.itemsize}") if type_name[0] == "s" else bits
            bits = signed.astype(kind)
        if active is not self.every:
            bits = np.where(active, bits, self.bits(operand.name))
        self.registers[operand.name] = bits

    def bits(self, name):
        """A register; NaN before it is written."""
        if name not in self.registers:
            width = self.program.width(name)
            self.registers[name] = np.full(self.n, NAN & (1 << width) - 1, UNSIGNED[width])
        return self.registers[name]

    def address(self, operand, type_name):
        """Addresses of all threads, as int64."""
        return self.read(operand.base, type_name).astype(np.int64) + operand.offset

    def parts(self, operand):
        return operand.parts if isinstance(operand, Vector) else (operand,)

    def _as_bits(self, register, width):
        """A register is read as a type of at most its width."""
        kind = UNSIGNED[width]
        return register if register.dtype == kind else register.astype(kind)

    def _constant(self, operand):
        if isinstance(operand, Constant):
            return np.full(self.n, operand.bits, np.uint64)
        if operand == Symbol("global_smem"):  # the dynamic shared memory, which begins at 0
            return np.zeros(self.n, np.uint64)
        raise UnknownInstruction(f"PTX symbol {operand} is not known")
