"""What the emulator finds that a card does not tell, each in a kernel of some lines of PTX.

`test_kernels.py` compares what the instructions calculate with the reference, in the kernels that use them.
"""

import numpy as np
import pytest

pytest.importorskip("triton")

from tests.emulator import accesses, arithmetic, machine, tensor_cores, warps  # noqa: F401  they enter their instructions
from tests.emulator.memory import Fault
from tests.emulator.program import Program

HEAD = """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1) {
    .reg .pred %p<9>; .reg .b32 %r<99>; .reg .b64 %rd<99>;
    ld.param.b64 %rd1, [kernel_param_0]; ld.param.b64 %rd2, [kernel_param_1]; mov.u32 %r1, %tid.x;
"""


def execute(body, data, out, threads=32, shared=0, blocks=1):
    """Run PTX with the addresses of two arrays in %rd1 and %rd2, and the thread in %r1."""
    values = [array.ctypes.data for array in (data, out)]
    ranges = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in (data, out)]
    machine.run(Program(HEAD + body + "\nret; }"), (blocks, 1, 1), threads, shared, values, ranges)
    return out


PLACE = "shl.b32 %r2, %r1, 2; cvt.u64.u32 %rd3, %r2; add.s64 %rd4, %rd1, %rd3; add.s64 %rd6, %rd2, %rd3;"
LOAD, STORE = "ld.global.b32 %r10, [%rd4];", "st.global.b32 [%rd6], %r10;"
# Each thread reads what the thread of another warp wrote.
EXCHANGE = "st.shared.b32 [%r2], %r10; bar.sync 0; xor.b32 %r3, %r2, 128; ld.shared.b32 %r10, [%r3];"
COPY = """
    cp.async.ca.shared.global [%r2], [%rd4], 4; cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
    ld.shared.b32 %r10, [%r2];
"""
SUMS = ", ".join(f"%r{number}" for number in range(20, 24))
PRODUCT = f"""
    mov.b32 %r3, %r2; mov.b32 %r10, 0;
    $L: st.shared.b32 [%r2], %r10; add.s32 %r2, %r2, 512; setp.lt.u32 %p1, %r2, 8192; @%p1 bra $L;
    fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned; mov.b64 %rd10, 0x4000004000000000;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{{SUMS}}}, %rd10, %rd10, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; mov.b32 %r10, %r20;
"""


def kernel(code):
    data, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    return execute(PLACE + LOAD + code + STORE, data, out, threads=128, shared=8192)


@pytest.mark.parametrize("code", ["", EXCHANGE, COPY, PRODUCT])
def test_nothing_is_found_in_what_is_right(code):
    kernel(code)


@pytest.mark.parametrize(
    ("code", "old", "new", "found"),
    [
        (EXCHANGE, "bar.sync 0;", "bar.warp.sync -1;", "race in shared memory: warp . reads what warp . wrote"),
        (
            EXCHANGE,
            "ld.shared.b32 %r10, [%r3];",
            "ld.shared.b32 %r9, [%r3]; st.shared.b32 [%r2], %r3;",
            "writes what another warp reads",
        ),
        (EXCHANGE, "xor.b32 %r3, %r2, 128;", "add.s32 %r3, %r2, 4;", "shared memory is read that nobody wrote"),
        (EXCHANGE, "xor.b32 %r3, %r2, 128;", "mov.b32 %r3, 8192;", "access to byte 8192 of 8192"),
        (EXCHANGE, "[%r2], %r10;", "[0], %r10;", "write different values to one place|writes what warp"),
        (EXCHANGE, "bar.sync 0;", "setp.lt.u32 %p1, %r1, 64; @%p1 bra $E; bar.sync 0; $E:", "do not reach a barrier"),
        (COPY, "cp.async.wait_group 0;", "", "before an asynchronous copy to it has ended"),
        (COPY, "cp.async.wait_group 0;", "cp.async.wait_group 1;", "before an asynchronous copy to it has ended"),
        (COPY, "cp.async.commit_group;", "", "before an asynchronous copy to it has ended"),
        (PRODUCT, "fence.proxy.async.shared::cta;", "", "without fence.proxy.async"),
        (PRODUCT, "bar.sync 0;", "", "an asynchronous product reads what a warp wrote, with no barrier"),
        (PRODUCT, "wgmma.fence.sync.aligned;", "", "no wgmma.fence before it"),
        (
            PRODUCT,
            "wgmma.wait_group",
            "bar.sync 0; st.shared.b32 [%r3], 1; wgmma.wait_group",
            "is written while an asynchronous product reads it",
        ),
        ("", "", "add.s64 %rd6, %rd6, 4;", "store of 4 bytes outside of all tensors by 1 threads, 512 bytes after"),
        ("", "", "st.global.b32 [%rd2], %r10; ld.global.b32 %r11, [%rd2];", "race: warp . loads what warp . stored"),
    ],
)
def test_what_is_wrong_is_found(code, old, new, found):
    with pytest.raises(Fault, match=found):
        kernel(code.replace(old, new) if old else new)


def test_a_loop_without_an_end_is_found(monkeypatch):
    monkeypatch.setattr(machine, "STEPS", 100)
    with pytest.raises(Fault, match="no end after 100 steps"):
        kernel("$L: add.s32 %r11, %r11, 0; bra $L;")


# Two warps of block 0 store, and one counts; block 1 waits for the count and loads what the other warp stored.
ORDERED = (
    PLACE
    + """
    mov.u32 %r3, %ctaid.x; setp.eq.s32 %p1, %r3, 1; @%p1 bra $WAIT;
    st.global.b32 [%rd6+4], %r1; bar.sync 0; setp.lt.u32 %p3, %r1, 32;
    @%p3 atom.global.gpu.acq_rel.add.u32 %r4, [%rd1], 1; ret;
    $WAIT: atom.global.gpu.acquire.add.u32 %r4, [%rd1], 0; setp.eq.s32 %p2, %r4, 0; @%p2 bra $WAIT;
    ld.global.b32 %r10, [%rd2+132]; st.global.b32 [%rd2], %r10;
"""
)


def test_blocks_exchange_values_by_a_barrier_and_an_atomic_operation():
    assert execute(ORDERED, np.zeros(1, np.uint32), np.zeros(65, np.uint32), threads=64, blocks=2)[0] == 32


@pytest.mark.parametrize(("old", "new"), [("bar.sync 0;", ""), ("acq_rel", "relaxed"), ("acquire", "relaxed")])
def test_without_one_of_them_nothing_orders_the_two(old, new):
    with pytest.raises(Fault, match="race: block 1 loads what block 0 stored, and nothing orders the two"):
        execute(ORDERED.replace(old, new), np.zeros(1, np.uint32), np.zeros(65, np.uint32), threads=64, blocks=2)


def test_two_blocks_may_not_store_to_the_same_place():
    data, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    with pytest.raises(Fault, match="race: blocks 0 and 1 store to the same place, and nothing orders them"):
        execute(PLACE + LOAD + STORE, data, out, blocks=2)


@pytest.mark.parametrize(
    "name",
    ["max.NaN.f32", "add.ftz.f32", "add.sat.f32", "setp.ltu.f32", "setp.ne.f32", "cvt.rni.s32.f32", "tex.1d.f32"],
)
def test_an_unknown_instruction_or_form_of_one_is_named(name):
    with pytest.raises(machine.UnknownInstruction, match=f"^PTX instruction {name} is not known"):
        kernel(f"{name} %p1, %r10, %r1;")
