"""Executes AMD's machine code: the work groups one after the other, each wave until its next barrier.

What is executed here and not by tinygrad's emulator is in `INSTRUCTIONS`, by the form of its name. The sources are
AMD's "RDNA3", "RDNA4" and "CDNA3 Instruction Set Architecture", and LLVM's "User Guide for AMDGPU Backend".
"""

import ctypes
import re
from itertools import product

import numpy as np

from tests.emulator.amd.code_object import CodeObject, kernel_arguments
from tests.emulator.amd.patches import decode, emulator
from tests.emulator.machine import NAN, STEPS, UnknownInstruction
from tests.emulator.memory import FILL, Actors, Fault, GlobalMemory, SharedMemory

ARCHITECTURES = {"gfx9": "cdna", "gfx11": "rdna3", "gfx12": "rdna4"}
BARRIERS = ("S_BARRIER", "S_BARRIER_WAIT")
DPP8 = (233, 234)  # as a source: lanes are exchanged within eight
DPP16 = 250
INSTRUCTIONS = []


def instruction(form):
    """Enter a function into the table of instructions. The first one whose form fits the whole name is taken."""

    def enter(execute):
        INSTRUCTIONS.append((re.compile(form), execute))
        return execute

    return enter


class Decoded:
    """An instruction at its place in the code: executed here, or by a compiled function of tinygrad's emulator.

    Attributes:
        name: As the ISA document has it.
        size: Bytes.
        word: All of its bits.
        execute: Executes it here.
        compiled: Executes it there.
        used: Which arrays of a wave `compiled` gets.
    """

    def __init__(self, given):
        self._given, self._format = given, type(given)
        self.name = emulator._op_name(given)
        self.size = given.size()
        self.word = given._raw
        self.execute = None
        self.compiled = None
        self.used = ()

    def __str__(self):
        return repr(self._given)

    def has(self, name):
        """Whether its format has a field of this name."""
        return hasattr(self._format, name)

    def field(self, name):
        """The bits of a field; 0 if its format has none of this name."""
        bits = getattr(self._format, name, None)
        return 0 if bits is None else self.word >> bits.lo & (1 << bits.hi - bits.lo + 1) - 1

    def signed(self, name):
        """The same as a number with a sign."""
        bits = getattr(self._format, name)
        sign = 1 << bits.hi - bits.lo
        return (self.field(name) ^ sign) - sign

    def register(self, *names):
        """The number of a register, by the name that its field has here. Of vector registers 256 is taken off."""
        return self.field(next(name for name in names if self.has(name))) & 255


def unknown(given, what=""):
    return UnknownInstruction(f"AMD instruction {given.name} is not known{what and ', '}{what}: {given}")


class Program:
    """A kernel and its decoded instructions."""

    def __init__(self, binary, target):
        self.code = CodeObject(binary)
        self.architecture = next(name for prefix, name in ARCHITECTURES.items() if target.startswith(prefix))
        self.lanes = emulator._wave_size(self.architecture)
        self._decoded = {}

    def at(self, place):
        if place not in self._decoded:
            self._decoded[place] = self._decode(place)
        return self._decoded[place]

    def _decode(self, place):
        try:
            given = Decoded(decode(ctypes.string_at(place, 16), self.architecture))
        except ValueError as error:
            raise UnknownInstruction(f"AMD instruction is not known: {error}") from error
        name = "DPP" if given.has("dpp") else given.name
        given.execute = next((execute for form, execute in INSTRUCTIONS if form.fullmatch(name)), None)
        if given.execute is None:
            if name.startswith("V_") and given.field("src0") in (*DPP8, DPP16):
                raise unknown(given, "with an exchange of lanes")
            self.compile(given, place)
        return given

    def compile(self, given, place):
        """By tinygrad's emulator. It reads the numbers of registers from the code at the place where it executes."""
        try:
            (program, runtime), _ = emulator._decode_at(place, self.architecture)
        except RuntimeError as error:
            raise unknown(given, str(error)) from error
        given.compiled, given.used = runtime.fxn, tuple(program.arg.globals)


def run(program, grid, threads, shared, values, ranges):
    """Execute all work groups of a launch.

    Args:
        grid: Number of work groups in each dimension.
        threads: Of a work group; a multiple of the lanes of a wave.
        shared: Bytes of dynamic shared memory of a work group.
        values: The arguments.
        ranges: [begin, end) addresses that the kernel may touch.
    """
    arguments = kernel_arguments(values, grid, threads)
    begin = ctypes.addressof(arguments)
    ranges = [*ranges, (begin, begin + len(arguments)), (program.code.begin, program.code.end)]
    memory = GlobalMemory(ranges)
    for number, (z, y, x) in enumerate(product(*map(range, reversed(grid)))):
        group = WorkGroup(program, number, (x, y, z), threads, shared, arguments, memory)
        with np.errstate(all="ignore"):
            group.run()


class WorkGroup:
    """A work group while it runs.

    Attributes:
        epoch: How many barriers it has passed.
    """

    def __init__(self, program, number, place, threads, shared, arguments, memory):
        self.program, self.number, self.place, self.memory = program, number, place, memory
        self.threads, self.arguments = threads, arguments
        self.shared = SharedMemory(program.code.shared + shared, 1)
        self.epoch = 0
        self.waves = [Wave(self, first) for first in range(0, threads, program.lanes)]

    def run(self):
        """Execute until all waves have ended."""
        running = self.waves
        while running:
            running = [wave for wave in running if wave.run()]
            self.epoch += 1


class Wave:
    """The lanes that execute one instruction together.

    Attributes:
        scalars: The scalar registers, then the constants and the registers with other names, by their codes.
        vectors: The vector registers [number, lane].
        accumulators: The registers of matrix instructions on CDNA [number, lane].
        scratch: The bytes of each lane [lane, byte].
        outstanding: The memory operations that it has not waited for, in their order; None for those that are no store.
    """

    def __init__(self, group, first):
        program = group.program
        self.group, self.program = group, program
        self.number = (group.number * group.threads + first) // program.lanes
        self.outstanding = []
        registers = program.code.scalar_registers(group.arguments)
        self._state = emulator._init_wave(
            program.code.entry,
            first,
            group.threads,
            group.threads,
            1,
            1,
            0,
            program.code.resources,
            0,
            program.architecture,
            *group.place,
            registers,
            program.lanes,
        )
        if program.architecture == "rdna4":  # the number of the wave, which the emulator leaves at 0
            self._state._write_sgpr(emulator.ttmp[8].offset, first // program.lanes << 25)
        self.scalars = np.frombuffer(self._state._sgpr_mv, np.uint32)
        buffers = [self._state.vgpr_buf, self._state.accvgpr_buf]
        self.vectors, self.accumulators = (
            np.frombuffer(buffer.as_memoryview(force_zero_copy=True), np.uint32).reshape(-1, program.lanes)
            for buffer in buffers
        )
        self.vectors[1:] = NAN & 0xFFFFFFFF  # of no register but the first is the value known
        self.accumulators[1:] = NAN & 0xFFFFFFFF
        self.scratch = np.full((program.lanes, program.code.scratch), FILL, np.uint8)
        # As tinygrad numbers them: scalars, vectors, memory, shared memory, scratch memory, accumulators.
        arrays = (self.scalars, self.vectors, None, None, None, self.accumulators)
        self._arrays = [ctypes.c_uint64(0 if array is None else array.ctypes.data) for array in arrays]

    def run(self):
        """Until the next barrier (True) or the end (False)."""
        state, program = self._state, self.program
        for _ in range(STEPS):
            place = state.pc
            if place == emulator.ENDPGM_PC:
                return False
            given = program.at(place)
            if given.execute:
                self._execute(given, place)
                state.pc = place + given.size
            else:
                self.call(given)
                if given.name in BARRIERS:
                    return True
        raise Fault(f"no end after {STEPS} steps, at: {program.at(state.pc)}")

    def _execute(self, given, place):
        try:
            given.execute(self, given)
        except Fault as fault:
            raise Fault(f"{fault}: {given} at byte {place - self.program.code.entry}") from None
        except UnknownInstruction:
            raise
        except Exception as error:
            raise unknown(given, f"{type(error).__name__}: {error}") from error

    def call(self, given, place=None):
        """Execute what was compiled, at the place of its code if it is not the present one."""
        if place is not None:
            self._state.pc = place
        given.compiled(*[self._arrays[number] for number in given.used])

    # What instructions use.

    @property
    def execution_mask(self):
        """The words of EXEC."""
        first = emulator.EXEC_LO.offset
        return self.scalars[first : first + self.program.lanes // 32]

    def active(self):
        """Which lanes execute."""
        return np.unpackbits(self.execution_mask.view(np.uint8), bitorder="little").astype(bool)

    def actors(self, lanes):
        """This wave, once for each of the lanes, for the memories."""
        return Actors(*(np.full(lanes, value) for value in (self.group.number, self.number, self.group.epoch)))

    def registers(self, given):
        """The vector registers, or the accumulators, that a memory instruction loads to and stores from."""
        return self.accumulators if given.field("acc") else self.vectors

    def address(self, number):
        """Two scalar registers."""
        return int(self.scalars[number]) | int(self.scalars[number + 1]) << 32
