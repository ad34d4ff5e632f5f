"""Loads, stores, atomic operations and waits. "Vector Memory", "Scalar Memory" and "Data Share" of the ISA documents;
LLVM, "Memory Model gfx942", "gfx10-gfx11", "gfx12".
"""

from functools import cache

import numpy as np

from tests.emulator.amd.machine import instruction, unknown
from tests.emulator.memory import MEMORY, Fault

# Bytes that a lane moves, by a part of the name: RDNA's words and CDNA's.
SIZES = {
    **dict.fromkeys(("U8", "I8", "B8", "UBYTE", "SBYTE", "BYTE"), 1),
    **dict.fromkeys(("U16", "I16", "B16", "USHORT", "SSHORT", "SHORT"), 2),
    **{f"B{32 * words}": 4 * words for words in (1, 2, 3, 4, 8, 16)},
    **{f"DWORD{f'X{words}' if words > 1 else ''}": 4 * words for words in (1, 2, 3, 4, 8, 16)},
}
SIGNED = ("I8", "SBYTE", "I16", "SSHORT")
MOVED = rf"(D16_|D16_HI_)?({'|'.join(SIZES)})(_D16|_D16_HI)?"
NO_SCALAR = 124  # from this code on an `saddr` is none: NULL in RDNA, 127 in CDNA
DEVICE = 2  # RDNA 4: the scope of what is ordered for the whole device


class Moved:
    """What a memory instruction of this name moves in each lane.

    Attributes:
        size: Bytes.
        words: Registers.
    """

    def __init__(self, name):
        kind = next(part for part in name.split("_") if part in SIZES)
        self.size = SIZES[kind]
        self.words = -(-self.size // 4)
        self._signed = kind in SIGNED
        self._half, self._high = "D16" in name, "D16_HI" in name

    def write(self, registers, number, lanes, data):
        """Bytes [lanes, size] to registers; half a register if the name says D16."""
        if self.size < 4:
            narrow = np.ascontiguousarray(data).view(f"{'i' if self._signed else 'u'}{self.size}")
            words = narrow.astype(np.int32 if self._signed else np.uint32).view(np.uint32)
        else:
            words = np.ascontiguousarray(data).view(np.uint32)
        if self._half:
            before, half = registers[number, lanes, None], words & np.uint32(0xFFFF)
            high = before & np.uint32(0xFFFF) | half << np.uint32(16)
            words = high if self._high else before & np.uint32(0xFFFF0000) | half
        registers[number : number + self.words, lanes] = words.T

    def read(self, registers, number, lanes):
        """Bytes [lanes, size] of registers."""
        data = np.ascontiguousarray(registers[number : number + self.words, lanes].T).view(np.uint8)
        return data[:, 2 : 2 + self.size] if self._high else data[:, : self.size]


moved_by = cache(Moved)


def _places(wave, given, size):
    """The active lanes, their addresses, and which of them are not masked by the size of a buffer."""
    lanes = np.flatnonzero(wave.active())
    if given.name.startswith("BUFFER"):
        return lanes, *_places_in_buffer(wave, given, size, lanes)
    low = given.register("vaddr", "addr")
    at = wave.vectors[low, lanes].astype(np.int64)
    base = given.register("saddr")
    if base < NO_SCALAR:
        at += wave.address(base)
    else:
        at |= wave.vectors[low + 1, lanes].astype(np.int64) << 32
    return lanes, at + given.signed(_offset(given)), np.ones(len(lanes), bool)


def _offset(given):
    """The name of the field: of RDNA 4, or of the others."""
    return "ioffset" if given.has("ioffset") else "offset"


def _places_in_buffer(wave, given, size, lanes):
    """A raw buffer: 48 bits of address, its size in bytes in the third word. Triton masks lanes by that size."""
    resource = given.field("rsrc") or 4 * given.field("srsrc")
    stride = int(wave.scalars[resource + 1]) >> 16 & 0x3FFF
    if stride or given.field("idxen") or given.field("lds"):
        raise unknown(given, "only raw buffers are")
    within = np.full(len(lanes), given.field(_offset(given)), np.int64)
    if given.field("offen"):
        within += wave.vectors[given.register("vaddr"), lanes]
    base = wave.address(resource) & (1 << 48) - 1
    base += int(wave.scalars[given.register("soffset")])
    return base + within, within + size <= int(wave.scalars[resource + 2])


def _count(wave, counted_as_store):
    """An operation of the wave is outstanding. CDNA counts all in their order, RDNA stores apart from loads."""
    if counted_as_store or wave.program.architecture == "cdna":
        wave.outstanding.append(None)


@instruction(rf"(GLOBAL|BUFFER)_LOAD_{MOVED}")
def _load(wave, given):
    """Lanes that are masked by the size of a buffer load 0."""
    moved = moved_by(given.name)
    lanes, at, inside = _places(wave, given, moved.size)
    data = np.zeros((len(lanes), moved.size), np.uint8)
    data[inside] = MEMORY[wave.group.memory.access("load", at[inside], moved.size, wave.actors(inside.sum()))]
    moved.write(wave.registers(given), given.register("vdst", "vdata"), lanes, data)
    _count(wave, False)


@instruction(rf"(GLOBAL|BUFFER)_STORE_{MOVED}")
def _store(wave, given):
    moved, memory = moved_by(given.name), wave.group.memory
    lanes, at, inside = _places(wave, given, moved.size)
    data = moved.read(wave.registers(given), given.register("vsrc", "vdata", "data"), lanes[inside])
    stores = len(memory.stores)
    places = memory.access("store", at[inside], moved.size, wave.actors(inside.sum()), waits=True)
    MEMORY[places] = data
    wave.outstanding += memory.stores[stores:] or [None]


@instruction(r"GLOBAL_ATOMIC_ADD(_U32)?")
def _atomic(wave, given):
    """One lane after the other. It gives back what was there if glc, sc0 or the lowest bit of th says so."""
    lanes, at, _ = _places(wave, given, 4)
    memory, registers = wave.group.memory, wave.registers(given)
    added = registers[given.register("vsrc", "data"), lanes]
    before = np.zeros(len(lanes), np.uint32)
    for lane, place in enumerate(memory.access("atomic", at, 4, wave.actors(len(lanes)))):
        before[lane] = MEMORY[place].view(np.uint32)[0]
        MEMORY[place] = (before[lane : lane + 1] + added[lane]).view(np.uint8)
    if len(lanes):
        memory.release(wave.group.number, wave.number, wave.group.epoch)
    returns = given.field("glc") or given.field("sc0") or given.field("th") & 1
    if returns:
        registers[given.register("vdst"), lanes] = before
    _count(wave, not returns)


@instruction(r"BUFFER_INV|BUFFER_GL[01]_INV|GLOBAL_INV|S_(DCACHE|GL1)_INV")
def _invalidate(wave, given):
    """Caches forget what they have, so that the work group loads what others published: for the device, not less."""
    for_device = {
        "BUFFER_INV": given.field("sc1"),
        "BUFFER_GL1_INV": True,
        "GLOBAL_INV": given.field("scope") >= DEVICE,
    }
    if for_device.get(given.name):
        wave.group.memory.acquire(wave.group.number)


@instruction(r"BUFFER_WBL2|GLOBAL_WB")
def _write_back(wave, given):
    """Caches write what they have: here there are none."""


@instruction(rf"SCRATCH_(LOAD|STORE)_{MOVED}")
def _access_scratch(wave, given):
    moved, lanes, registers = moved_by(given.name), np.flatnonzero(wave.active()), wave.registers(given)
    at = np.full(len(lanes), given.signed(_offset(given)))
    if given.field("sve"):
        at += wave.vectors[given.register("vaddr", "addr"), lanes]
    if given.register("saddr") < NO_SCALAR:
        at += int(wave.scalars[given.register("saddr")])
    if ((at < 0) | (at + moved.size > wave.program.code.scratch)).any():
        raise Fault(f"access to byte {at[0]} of {wave.program.code.scratch} bytes of scratch memory")
    places = lanes[:, None], at[:, None] + np.arange(moved.size)
    if "LOAD" in given.name:
        moved.write(registers, given.register("vdst"), lanes, wave.scratch[places])
    else:
        wave.scratch[places] = moved.read(registers, given.register("vsrc", "data"), lanes)
    _count(wave, "STORE" in given.name)


@instruction(r"S_WAIT.*")
def _wait(wave, given):
    """Until so many operations are outstanding. Loads are executed at once, so only the waits for stores matter."""
    name, number = given.name, given.field("simm16")
    if wave.program.architecture == "cdna":
        left = number & 15 | (number >> 14 & 3) << 4
    elif "VSCNT" in name or "STORECNT" in name:
        left = number >> 8 & 63 if "DSCNT" in name else number & 63
    else:
        return
    while len(wave.outstanding) > left:
        store = wave.outstanding.pop(0)
        if store:
            store.waited = wave.group.epoch


@instruction(rf"S_LOAD_({'|'.join(SIZES)})")
def _load_scalar(wave, given):
    """At a multiple of 4 bytes, for all lanes. A scalar register is added unless soffset is NULL or CDNA says no."""
    moved = moved_by(given.name)
    at = wave.address(2 * given.field("sbase"))
    at += given.signed(_offset(given))
    if wave.program.architecture != "cdna" or given.field("soffset_en"):
        at += int(wave.scalars[given.register("soffset")])
    at = np.array([at if moved.size < 4 else at & ~3])
    data = MEMORY[wave.group.memory.access("load", at, moved.size, wave.actors(1))]
    moved.write(wave.scalars[:, None], given.register("sdata"), np.zeros(1, np.int64), data)


@instruction(rf"DS_(LOAD|STORE|READ2?|WRITE2?|READ2ST64|WRITE2ST64)_(2ADDR_|2ADDR_STRIDE64_)?{MOVED}")
def _access_shared(wave, given):
    """Two places if the name has a 2: their offsets count values, or 64 values."""
    name, moved, lanes = given.name, moved_by(given.name), np.flatnonzero(wave.active())
    if not len(lanes):
        return
    registers, shared, actors = wave.registers(given), wave.group.shared, wave.actors(len(lanes))
    if "2ADDR" in name or name.startswith(("DS_READ2", "DS_WRITE2")):
        step = moved.size * (64 if "64_" in name else 1)
        offsets = [given.field("offset0") * step, given.field("offset1") * step]
    else:
        offsets = [given.field("offset0") | given.field("offset1") << 8]
    to, at = given.register("vdst"), wave.vectors[given.register("addr"), lanes].astype(np.int64)
    for offset, data in zip(offsets, ("data0", "data1"), strict=False):
        places = shared.places(at + offset, moved.size, np.zeros(len(lanes), np.int64))
        if "STORE" in name or "WRITE" in name:
            shared.store(places, moved.read(registers, given.register(data), lanes), actors)
        else:
            moved.write(registers, to, lanes, shared.load(places, actors))
            to += moved.words
