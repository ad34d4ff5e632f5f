"""A kernel in memory, and its arguments. LLVM, "User Guide for AMDGPU Backend": "Code Object", "Kernel Dispatch"."""

import ctypes
import struct

from tests.emulator.amd.patches import KernelDescriptor, load_elf

LOADED = 256  # bytes of code that load the arguments, for firmware that does not load them to registers
IMPLICIT = 256  # bytes of arguments that every kernel gets


class CodeObject:
    """The one kernel of a code object.

    Attributes:
        begin, end: The addresses of the code and its constants.
        entry: The address of the first instruction.
        shared: Bytes of shared memory, without those that the launch adds.
        scratch: Bytes of memory that each lane has for itself, for registers that were spilled.
        resources: `compute_pgm_rsrc2`.
    """

    def __init__(self, binary):
        image, sections, _ = load_elf(binary)
        place = next(section.header.sh_addr for section in sections if section.name == ".rodata")
        self._image = ctypes.create_string_buffer(bytes(image) + bytes(64))  # the decoder reads ahead
        self._descriptor = KernelDescriptor.from_buffer_copy(self._image, place)
        self.begin = ctypes.addressof(self._image)
        self.end = self.begin + len(image)
        self.shared = self._descriptor.group_segment_fixed_size
        self.scratch = self._descriptor.private_segment_fixed_size
        self.resources = self._descriptor.compute_pgm_rsrc2
        self.entry = self.begin + place + self._descriptor.kernel_code_entry_byte_offset
        self.entry += LOADED if self._preloaded else 0

    @property
    def _preloaded(self):
        """Words of the arguments that are in registers when the kernel begins."""
        return self._descriptor.kernarg_preload & 127

    def scalar_registers(self, arguments):
        """The first scalar registers when the kernel begins. "Initial Kernel Execution State"."""
        address = ctypes.addressof(arguments)
        registers = []
        # Scratch memory, packet of the dispatch, queue, arguments, number of the dispatch, scratch memory (three).
        for bit, count in enumerate((4, 2, 2, 2, 2, 2, 1)):
            if self._descriptor.kernel_code_properties >> bit & 1:
                registers += [address & 0xFFFFFFFF, address >> 32] if bit == 3 else [0] * count
        first = self._descriptor.kernarg_preload >> 7
        return registers + list(struct.unpack_from(f"<{self._preloaded}I", arguments, 4 * first))


def kernel_arguments(values, grid, threads):
    """The arguments, each at a multiple of its size, and then the implicit ones. "Code Object V5 Metadata"."""
    packed = b""
    for value in values:
        packed += bytes(-len(packed) % len(value)) + value
    packed += bytes(-len(packed) % 8)
    sizes = struct.pack("<3I3H", *grid, threads, 1, 1).ljust(64, b"\0")
    dimensions = struct.pack("<H", 3)
    return ctypes.create_string_buffer(packed + (sizes + dimensions).ljust(IMPLICIT, b"\0"))
