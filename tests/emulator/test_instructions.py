"""Each group of instructions of the interpreter, in PTX written here, against numpy."""

import numpy as np
import pytest

pytest.importorskip("triton")

from tests.emulator import accesses, arithmetic, tensor_cores, warps  # noqa: F401  they enter their instructions
from tests.emulator.machine import INSTRUCTIONS, UnknownInstruction, run
from tests.emulator.program import Program
from tests.emulator.types import bf16_to_float, float_to_bf16

HEAD = """
.visible .entry kernel(.param .u64 kernel_param_0, .param .u64 kernel_param_1) {
    .reg .pred %p<9>; .reg .b16 %rs<99>; .reg .b32 %r<99>; .reg .b64 %rd<99>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
"""
GENERATOR = np.random.default_rng(0)
INTEGERS = GENERATOR.integers(-(2**31), 2**31, (32, 4)).astype(np.int32)
FLOATS = (4 * GENERATOR.standard_normal((32, 4))).astype(np.float32)


def execute(body, data, out, threads=32, shared=0, blocks=1):
    """Run PTX with the addresses of two arrays in %rd1 and %rd2, and the thread in %r1."""
    ranges = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in (data, out)]
    values = [array.ctypes.data for array in (data, out)]
    run(Program(HEAD + body + "\nret; }"), (blocks, 1, 1), threads, shared, values, ranges)
    return out


def rows(body, data, result):
    """The `result` register (as its PTX type) of each thread, with the four values of its row in %r10 to %r13."""
    bits = {"p": 32, "b16": 16, "b32": 32, "b64": 64}[result.split()[0]]
    kind, register = result.split()
    load = f"""
        mul.wide.u32 %rd3, %r1, 16; add.s64 %rd4, %rd1, %rd3;
        ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd4];
        mul.wide.u32 %rd5, %r1, {bits // 8}; add.s64 %rd6, %rd2, %rd5;
    """
    store = f"selp.b32 %r98, 1, 0, {register}; st.global.b32 [%rd6], %r98;"
    store = store if kind == "p" else f"st.global.{kind} [%rd6], {register};"
    out = np.zeros(len(data), {16: np.uint16, 32: np.uint32, 64: np.uint64}[bits])
    return execute(load + body + store, np.ascontiguousarray(data), out, len(data))


A, B, C, D = np.ascontiguousarray(INTEGERS.T)
U, V = A.astype(np.uint32), B.astype(np.uint32)
S = V & 63  # shifts, also by more than the width


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.s32 %r20, %r10, %r11;", A + B),
        ("sub.s32 %r20, %r10, %r11;", A - B),
        ("mul.lo.s32 %r20, %r10, %r11;", A * B),
        ("mad.lo.s32 %r20, %r10, %r11, %r12;", A * B + C),
        ("div.s32 %r20, %r10, %r11;", np.trunc(A / B.astype(np.float64))),
        ("div.u32 %r20, %r10, %r11;", U // V),
        ("min.s32 %r20, %r10, %r11;", np.minimum(A, B)),
        ("max.u32 %r20, %r10, %r11;", np.maximum(U, V)),
        ("neg.s32 %r20, %r10;", -A),
        ("abs.s32 %r20, %r10;", np.abs(A)),
        ("not.b32 %r20, %r10;", ~A),
        ("and.b32 %r21, %r10, %r11; or.b32 %r22, %r21, %r12; xor.b32 %r20, %r22, %r13;", (A & B | C) ^ D),
        ("and.b32 %r21, %r11, 63; shl.b32 %r20, %r10, %r21;", np.where(S < 32, U << np.minimum(S, 31), 0)),
        ("and.b32 %r21, %r11, 63; shr.s32 %r20, %r10, %r21;", A >> np.minimum(S, 31).astype(np.int32)),
        ("popc.b32 %r20, %r10;", [bin(int(u)).count("1") for u in U]),
        ("bfe.u32 %r20, %r10, 4, 15;", U >> np.uint32(4) & np.uint32(0x7FFF)),
        ("bfe.s32 %r20, %r10, 20, 12;", A >> 20),
        ("prmt.b32 %r20, %r10, %r11, 0x0123;", U.byteswap()),
        ("setp.lt.s32 %p1, %r10, %r11; selp.b32 %r20, %r12, %r13, %p1;", np.where(A < B, C, D)),
        ("cvt.s16.s32 %rs1, %r10; cvt.s32.s16 %r20, %rs1;", A.astype(np.int16)),
        ("cvt.u32.u8 %r20, %r10;", U & np.uint32(255)),
        ("mov.b32 {%rs1, %rs2}, %r10; mov.b32 %r20, {%rs2, %rs1};", U << np.uint32(16) | U >> np.uint32(16)),
        ("add.s16x2 %r20, %r10, %r11;", (A.view(np.int16) + B.view(np.int16)).view(np.uint32)),
    ],
)
def test_integers(code, expected):
    expected = np.asarray(expected).astype(np.int64).astype(np.uint32)
    assert (rows(code, INTEGERS, "b32 %r20") == expected).all()


E, F, G, H = np.ascontiguousarray(FLOATS.T)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.f32 %r20, %r10, %r11;", E + F),
        ("sub.rn.f32 %r20, %r10, %r11;", E - F),
        ("mul.f32 %r20, %r10, %r11;", E * F),
        ("fma.rn.f32 %r20, %r10, %r11, %r12;", (E.astype(float) * F + G).astype(np.float32)),
        ("div.rn.f32 %r20, %r10, %r11;", E / F),
        ("max.f32 %r20, %r10, %r11;", np.maximum(E, F)),
        ("max.f32 %r20, %r10, %r11, %r12;", np.maximum(np.maximum(E, F), G)),
        ("abs.f32 %r21, %r10; sqrt.rn.f32 %r20, %r21;", np.sqrt(np.abs(E))),
        ("neg.f32 %r20, %r10;", -E),
        (
            "cvt.rn.f16x2.f32 %r21, %r10, %r11; mov.b32 {%rs1, %rs2}, %r21; cvt.f32.f16 %r20, %rs2;",
            E.astype(np.float16),
        ),
        ("cvt.rn.bf16.f32 %rs1, %r10; cvt.f32.bf16 %r20, %rs1;", bf16_to_float(float_to_bf16(E))),
        ("mul.f32x2 %rd9, {%r10, %r11}, {%r12, %r13}; mov.b64 {%r21, %r20}, %rd9;", F * H),
    ],
)
def test_floats(code, expected):
    code = code.replace("{%r10, %r11}, {%r12, %r13}", "%rd7, %rd8")
    code = "mov.b64 %rd7, {%r10, %r11}; mov.b64 %rd8, {%r12, %r13};" + code
    assert (rows(code, FLOATS, "b32 %r20").view(np.float32) == np.asarray(expected, np.float32)).all()


def test_nan():
    """The maximum is the number; a comparison is false, but nan."""
    data = np.tile(np.array([np.nan, 2, 0, 0], np.float32), (32, 1))
    assert (rows("max.f32 %r20, %r10, %r11;", data, "b32 %r20").view(np.float32) == 2).all()
    for comparison, expected in (("lt", 0), ("ge", 0), ("nan", 1)):
        assert (rows(f"setp.{comparison}.f32 %p1, %r10, %r11;", data, "p %p1") == expected).all()
    assert (rows("cvt.rzi.s32.f32 %r20, %r10;", data, "b32 %r20") == 0).all()
    assert (rows("cvt.rzi.s32.f32 %r20, %r10;", FLOATS, "b32 %r20").view(np.int32) == np.trunc(E)).all()


@pytest.mark.parametrize(
    "name", ["max.NaN.f32", "add.ftz.f32", "add.sat.f32", "setp.ltu.f32", "setp.ne.f32", "cvt.rni.s32.f32"]
)
def test_other_forms_of_an_instruction_are_not_known(name):
    with pytest.raises(UnknownInstruction, match=f"PTX instruction {name} is not known"):
        rows(f"{name} %p1, %r10, %r11;", FLOATS, "b32 %r20")


def test_64_bits():
    data = GENERATOR.integers(-(2**62), 2**62, (32, 2))
    code = "mov.b64 %rd7, {%r10, %r11}; mov.b64 %rd8, {%r12, %r13};"
    a, b = np.ascontiguousarray(data.T)
    for operation, expected in (
        ("xor.b64 %rd9, %rd7, %rd8;", a ^ b),
        ("or.b64 %rd9, %rd7, 4611686293305294848;", a | 0x4000004000000000),
        ("min.s64 %rd9, %rd7, %rd8;", np.minimum(a, b)),
        ("shr.s64 %rd9, %rd7, 17;", a >> 17),
        ("mul.wide.s32 %rd9, %r10, %r12;", (a.astype(np.int32)).astype(np.int64) * b.astype(np.int32)),
        ("cvt.s64.s32 %rd9, %r10;", a.astype(np.int32)),
        ("div.s64 %rd9, %rd7, %rd8;", np.sign(a) * np.sign(b) * (abs(a) // abs(b))),
    ):
        found = rows(code + operation, data.view(np.int32), "b64 %rd9").view(np.int64)
        assert (found == expected.astype(np.int64)).all(), operation


LANE = np.arange(32)
BRANCH = """
    setp.lt.s32 %p1, %r1, 7; @%p1 bra $L; mov.b32 %r20, 1; bra $M;
    $L: mov.b32 %r20, 2; $M: add.s32 %r20, %r20, 1;
"""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("shfl.sync.bfly.b32 %r20, %r10, 5, 31, -1;", A[LANE ^ 5]),
        ("shfl.sync.up.b32 %r20, %r10, 3, 0, -1;", A[np.where(LANE < 3, LANE, LANE - 3)]),
        ("and.b32 %r21, %r11, 31; shfl.sync.idx.b32 %r20, %r10, %r21, 31, -1;", A[B & 31]),
        ("shfl.sync.idx.b32 %r20, %r10, 9, 0x181f, -1;", A[LANE // 8 * 8 + 1]),
        ("redux.sync.add.s32 %r20, %r10, -1;", np.full(32, A.sum(dtype=np.int32))),
        ("redux.sync.max.s32 %r20, %r10, -1;", np.full(32, A.max())),
        (
            BRANCH,
            np.where(LANE < 7, 3, 2),
        ),
        ("mov.b32 %r20, 0; $L: add.s32 %r20, %r20, 1; setp.lt.s32 %p1, %r20, %r1; @%p1 bra $L;", np.maximum(LANE, 1)),
        ("mov.b32 %r20, 4; setp.lt.s32 %p1, %r1, 7; @!%p1 mov.b32 %r20, 5;", np.where(LANE < 7, 4, 5)),
    ],
)
def test_warps_and_branches(code, expected):
    assert (rows(code, INTEGERS, "b32 %r20") == np.asarray(expected).astype(np.int64).astype(np.uint32)).all()


def test_products_of_warps():
    """mma.m16n8k16 with registers filled as the figures of the PTX ISA say."""
    a, b = (GENERATOR.standard_normal(shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
    data = np.zeros((32, 12), np.float16)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for number, (i, k) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
            data[lane, 2 * number : 2 * number + 2] = a[row + i, column + k : column + k + 2]
        for number, k in enumerate((0, 8)):
            data[lane, 8 + 2 * number : 10 + 2 * number] = b[column + k : column + k + 2, row]
    code = """
        mul.wide.u32 %rd3, %r1, 24; add.s64 %rd4, %rd1, %rd3; mul.wide.u32 %rd5, %r1, 16; add.s64 %rd6, %rd2, %rd5;
        ld.global.v2.b32 {%r10, %r11}, [%rd4]; ld.global.v2.b32 {%r12, %r13}, [%rd4+8];
        ld.global.v2.b32 {%r14, %r15}, [%rd4+16]; mov.b32 %r20, 0f3F000000;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r30, %r31, %r32, %r33}, {%r10, %r11, %r12, %r13},
            {%r14, %r15}, {%r20, %r20, %r20, %r20};
        st.global.v4.b32 [%rd6], {%r30, %r31, %r32, %r33};
    """
    found, expected = (
        execute(code, data, np.zeros((32, 4), np.float32)),
        a.astype(np.float32) @ b.astype(np.float32) + 0.5,
    )
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        parts = [expected[row, column : column + 2], expected[row + 8, column : column + 2]]
        np.testing.assert_allclose(found[lane], np.concatenate(parts), rtol=1e-5, atol=1e-5)


def test_matrices_to_and_from_shared_memory():
    """stmatrix writes rows of eight halves, and ldmatrix.trans reads their columns."""
    code = """
        mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd1, %rd3; add.s64 %rd6, %rd2, %rd3; ld.global.b32 %r10, [%rd4];
        shl.b32 %r11, %r1, 4; and.b32 %r12, %r11, 127;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r12], {%r10}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r20}, [%r12]; st.global.b32 [%rd6], %r20;
    """
    matrix = GENERATOR.standard_normal((8, 8)).astype(np.float16)
    assert (execute(code, matrix, np.zeros((8, 8), np.float16), shared=128) == matrix.T).all()


SWIZZLES = {128: 1, 64: 2, 32: 3, 16: 0}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", SWIZZLES)
def test_products_of_warp_groups(width, transposed):
    """wgmma.m64n16k16: rows of `width` bytes whose 16-byte pieces are exchanged by the number of the row, mod 8."""
    a, b = (GENERATOR.standard_normal(shape).astype(np.float16) for shape in ((64, 16), (16, 16)))
    memory, leading, stride = np.zeros(1 << 15, np.uint8), 512 if width == 16 else 2048, 1024

    def place(matrix, at):
        """Write [rows, k] as the layouts of the PTX ISA say; the descriptor."""
        # Pieces of `width` bytes lie one behind the other, eight of them together.
        between_pieces, between_eights = (stride, leading) if transposed and width == 16 else (leading, stride)
        for row in range(len(matrix)):
            for k in range(16):
                byte, piece = (2 * row, k) if transposed else (2 * k, row)
                where = byte % width + byte // width * between_pieces + piece % 8 * width + piece // 8 * between_eights
                where ^= (where >> 7 & width // 16 - 1) << 4
                memory[at + where : at + where + 2] = matrix[row, k : k + 1].view(np.uint8)
        return at >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | SWIZZLES[width] << 62

    first, second = place(a, 0), place(b, 1 << 14)
    flag, out = int(transposed), ", ".join(f"%r{number}" for number in range(20, 28))
    code = f"""
        shl.b32 %r2, %r1, 4; cvt.u64.u32 %rd3, %r2; add.s64 %rd4, %rd1, %rd3;
        $L: ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd4]; st.shared.v4.b32 [%r2], {{%r10, %r11, %r12, %r13}};
        add.s64 %rd4, %rd4, 2048; add.s32 %r2, %r2, 2048; setp.lt.u32 %p1, %r2, 32768; @%p1 bra $L;
        fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;
        mov.b64 %rd10, {first}; mov.b64 %rd11, {second};
        wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {{{out}}}, %rd10, %rd11, 0, 1, 1, {flag}, {flag};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        mul.wide.u32 %rd5, %r1, 32; add.s64 %rd6, %rd2, %rd5;
        st.global.v4.b32 [%rd6], {{%r20, %r21, %r22, %r23}}; st.global.v4.b32 [%rd6+16], {{%r24, %r25, %r26, %r27}};
    """
    found = execute(code, memory, np.zeros((128, 8), np.float32), threads=128, shared=1 << 15)
    expected = a.astype(np.float32) @ b.T.astype(np.float32)
    for thread in range(128):
        row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
        values = [expected[row + 8 * i, column + 8 * j : column + 8 * j + 2] for j in range(2) for i in range(2)]
        np.testing.assert_allclose(found[thread], np.concatenate(values), rtol=1e-5, atol=1e-5)


def test_atomic_operations_of_several_blocks():
    """A counter: each thread gets another number."""
    code = """
        atom.global.gpu.acq_rel.add.u32 %r20, [%rd1], 1; mul.wide.u32 %rd5, %r20, 4; add.s64 %rd6, %rd2, %rd5;
        st.global.b32 [%rd6], %r20;
    """
    counter = np.zeros(1, np.uint32)
    numbers = execute(code, counter, np.zeros(256, np.uint32), threads=64, blocks=4)
    assert counter[0] == 256 and (numbers == np.arange(256)).all()


def test_a_block_may_wait_for_another_one():
    """A lock: block 0 waits in a loop until block 1 has stored."""
    code = """
        mov.u32 %r2, %ctaid.x; setp.eq.s32 %p1, %r2, 1; @%p1 bra $STORE;
        $WAIT: atom.global.gpu.acq_rel.add.u32 %r3, [%rd1], 0; setp.eq.s32 %p2, %r3, 0; @%p2 bra $WAIT;
        ld.global.b32 %r4, [%rd2]; st.global.b32 [%rd2+4], %r4; ret;
        $STORE: mov.b32 %r5, 7; st.global.b32 [%rd2], %r5; bar.sync 0;
        atom.global.gpu.acq_rel.add.u32 %r6, [%rd1], 1;
    """
    assert list(execute(code, np.zeros(1, np.uint32), np.zeros(2, np.uint32), blocks=2)) == [7, 7]


def test_what_is_not_known_is_named():
    with pytest.raises(UnknownInstruction, match=r"PTX instruction tex\.1d\.v4\.f32\.s32 is not known"):
        execute("tex.1d.v4.f32.s32 %r20, %r10;", np.zeros(1), np.zeros(1))
    assert len(INSTRUCTIONS) > 25
