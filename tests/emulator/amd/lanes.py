"""Instructions that move values between the lanes of a wave. "Data Parallel Processing (DPP)" and "Data Share".

tinygrad's emulator writes lane by lane, so it reads what it has just written where source and result are one register.
"""

import ctypes
import struct

import numpy as np

from tests.emulator.amd.machine import instruction, unknown

ROW = 16  # lanes


def sources(given, lanes, cdna):
    """Which lane each lane reads, and whether there is one. The values of `dpp_ctrl`."""
    control, lane = given.field("dpp"), np.arange(lanes)
    row, within, always = lane & ~15, lane & 15, np.ones(lanes, bool)
    if control < 0x100:  # quad_perm
        return (lane & ~3) + (control >> 2 * (lane & 3) & 3), always
    number = control & 15
    if control & 0x1F0 == 0x110:  # row_shr
        return lane - number, within >= number
    if control & 0x1F0 == 0x120:  # row_ror
        return row + (within - number) % ROW, always
    if control == 0x141:  # row_half_mirror
        return (lane & ~7) + 7 - (lane & 7), always
    if control == 0x142 and cdna:  # row_bcast:15
        return row - 1, lane >= ROW
    if control == 0x143 and cdna:  # row_bcast:31
        return np.full(lanes, 31), lane >= 32
    if control & 0x1F0 == 0x160 and not cdna:  # row_xmask
        return lane ^ number, always
    raise unknown(given, f"dpp_ctrl {control:#x}")


@instruction("DPP")
def _exchange(wave, given):
    """The exchanged lanes go to a free register, and the instruction without DPP reads that."""
    vectors, lane = wave.vectors, np.arange(wave.program.lanes)
    if given.field("src1_abs") or given.field("src1_neg") or "V_CMP" in given.name:
        raise unknown(given)
    active = wave.active()
    source, exists = sources(given, len(lane), wave.program.architecture == "cdna")
    source = np.where(exists, source, 0)
    readable = exists & (active[source] | bool(given.field("fi")))
    rows = given.field("row_mask") >> lane // ROW & 1
    banks = given.field("bank_mask") >> (lane % ROW // 4) & 1
    written = active & (rows & banks).astype(bool) & (readable | bool(given.field("bc")))
    values = np.where(readable, vectors[given.register("vsrc0")][source], 0).astype(np.uint32)
    values = values & np.uint32(0x7FFFFFFF) if given.field("src0_abs") else values
    values = values ^ np.uint32(0x80000000) if given.field("src0_neg") else values

    used = {given.register(name) for name in ("vdst", "vsrc1") if given.has(name)}
    free = next(number for number in range(255, 0, -1) if not {number, number + 1} & used)
    word = given.word & 0xFFFFFE00 | 256 + free
    code = ctypes.create_string_buffer(struct.pack("<I", word) + bytes(28))
    place = ctypes.addressof(code)
    before, mask = vectors[free].copy(), wave.execution_mask.copy()
    vectors[free] = values
    wave.execution_mask[:] = np.packbits(written, bitorder="little").view(np.uint32)
    if given.compiled is None:
        wave.program.compile(given, place)
    wave.call(given, place)
    vectors[free], wave.execution_mask[:] = before, mask


@instruction(r"V_PERMLANEX16_B32.*")
def _permute_rows(wave, given):
    """Each lane reads one of the other row of its half, that two scalar operands name."""
    lanes, active = np.arange(wave.program.lanes), wave.active()
    if not (given.field("opsel") & 1 or active.all()):
        raise unknown(given, "with lanes that do not execute")
    selection = wave.scalars[[given.field("src1"), given.field("src2")]].view(np.uint64)[0]
    chosen = selection >> (4 * (lanes % ROW)).astype(np.uint64) & np.uint64(15)
    source = (lanes & ~15 ^ ROW) + chosen.astype(np.int64)
    values = wave.vectors[given.register("src0")][source]
    wave.vectors[given.register("vdst"), active] = values[active]


@instruction(r"DS_BPERMUTE_B32")
def _permute(wave, given):
    """Each lane reads from the lane that its address names, in bytes."""
    vectors, active = wave.vectors, wave.active()
    offset = given.field("offset0") | given.field("offset1") << 8
    other = (vectors[given.register("addr")].astype(np.int64) + offset) // 4 % wave.program.lanes
    values = np.where(active[other], vectors[given.register("data0")][other], 0)
    vectors[given.register("vdst"), active] = values[active]


@instruction(r"(GLOBAL|BUFFER|DS|FLAT|SCRATCH|S_BUFFER|S_STORE|S_ATOMIC|S_SCRATCH)_.*")
def _unknown(wave, given):
    """No other access to memory is executed, because it would not be checked."""
    raise unknown(given)
