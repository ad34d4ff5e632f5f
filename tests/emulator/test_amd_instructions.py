"""What is executed here of AMD's machine code, in kernels of some lines of assembly, which Triton assembles."""

from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton")

from triton.backends.amd.compiler import HIPBackend

from tests.emulator import amd
from tests.emulator.memory import Fault

# Each thread loads a word of the first array to v2, and stores v2 to the second array; v1 is its place in bytes.
BEGIN = {
    "rdna": "s_load_b128 s[4:7], s[0:1], 0x0\ns_waitcnt lgkmcnt(0)\nv_lshlrev_b32 v1, 2, v0\n"
    "global_load_b32 v2, v1, s[4:5]",
    "cdna": "s_load_dwordx4 s[4:7], s[0:1], 0x0\ns_waitcnt lgkmcnt(0)\nv_lshlrev_b32 v1, 2, v0\n"
    "global_load_dword v2, v1, s[4:5]",
}
END = {
    "rdna": "s_waitcnt lgkmcnt(0)\nglobal_store_b32 v1, v2, s[6:7]\ns_endpgm",
    "cdna": "s_waitcnt lgkmcnt(0)\nglobal_store_dword v1, v2, s[6:7]\ns_endpgm",
}
KERNEL = """
.amdgcn_target "amdgcn-amd-amdhsa--{target}"
.amdhsa_code_object_version 5
.text
.p2align 8
.globl kernel
.type kernel,@function
kernel:
{code}
.size kernel, .-kernel
.rodata
.p2align 6
.amdhsa_kernel kernel
.amdhsa_group_segment_fixed_size 1024
.amdhsa_user_sgpr_kernarg_segment_ptr 1
.amdhsa_next_free_vgpr 16
.amdhsa_next_free_sgpr 16
{directive}
.end_amdhsa_kernel
"""
THREADS = 128
DATA = np.random.default_rng(0).integers(0, 2**32, THREADS, np.uint32)
THREAD = np.arange(THREADS)
IN_ROW = THREAD % 16


def execute(target, body, data=DATA):
    family = "rdna" if target == "gfx1100" else "cdna"
    directive = ".amdhsa_wavefront_size32 1" if family == "rdna" else ".amdhsa_accum_offset 16"
    code = "\n".join([BEGIN[family], "s_waitcnt vmcnt(0)", body, END[family]])
    text = KERNEL.format(target=target, code=code, directive=directive)
    machine, *_ = (import_module(f"tests.emulator.amd.{name}") for name in ("machine", "accesses", "lanes"))
    program = machine.Program(HIPBackend.make_hsaco(text, {}, SimpleNamespace(arch=target)), target)
    data, out = data.copy(), np.zeros(THREADS, np.uint32)
    ranges = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in (data, out)]
    values = [array.ctypes.data.to_bytes(8, "little") for array in (data, out)]
    machine.run(program, (1, 1, 1), THREADS, 0, values, ranges)
    return out


EVERY = "row_mask:0xf bank_mask:0xf"


@pytest.mark.parametrize("target", amd.targets("gfx1100", "gfx942"))
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"v_mov_b32_dpp v2, v2 quad_perm:[3,2,1,0] {EVERY}", DATA[THREAD ^ 3]),
        (f"v_mov_b32_dpp v2, v2 row_shl:1 {EVERY}", np.where(IN_ROW < 15, np.roll(DATA, -1), DATA)),
        (f"v_mov_b32_dpp v2, v2 row_shr:3 {EVERY}", np.where(IN_ROW >= 3, np.roll(DATA, 3), DATA)),
        (f"v_mov_b32_dpp v2, v2 row_shr:3 {EVERY} bound_ctrl:1", np.where(IN_ROW >= 3, np.roll(DATA, 3), 0)),
        (f"v_mov_b32_dpp v2, v2 row_ror:4 {EVERY}", DATA[THREAD - IN_ROW + (IN_ROW - 4) % 16]),
        (f"v_mov_b32_dpp v2, v2 row_mirror {EVERY}", DATA[THREAD ^ 15]),
        (f"v_mov_b32_dpp v2, v2 row_half_mirror {EVERY}", DATA[THREAD ^ 7]),
        ("v_mov_b32_dpp v2, v2 row_mirror row_mask:0x1 bank_mask:0xf", None),
        ("v_xor_b32_dpp v2, v2, v2 row_mirror row_mask:0xf bank_mask:0xf", DATA ^ DATA[THREAD ^ 15]),
        ("v_xor_b32 v3, 20, v1\nds_bpermute_b32 v2, v3, v2\ns_waitcnt lgkmcnt(0)", DATA[THREAD ^ 5]),
        ("v_xor_b32 v3, 20, v1\nds_permute_b32 v2, v3, v2\ns_waitcnt lgkmcnt(0)", DATA[THREAD ^ 5]),
        ("ds_swizzle_b32 v2, v2 offset:swizzle(SWAP,8)\ns_waitcnt lgkmcnt(0)", DATA[THREAD ^ 8]),
    ],
)
def test_exchanges_between_lanes(target, body, expected):
    if expected is None:  # the first row of each wave alone
        lanes = 32 if target == "gfx1100" else 64
        expected = np.where(THREAD % lanes < 16, DATA[THREAD ^ 15], DATA)
    assert np.array_equal(execute(target, body), expected)


@pytest.mark.parametrize("target", amd.targets("gfx1100"))
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"v_mov_b32_dpp v2, v2 row_share:5 {EVERY}", DATA[THREAD - IN_ROW + 5]),
        (f"v_mov_b32_dpp v2, v2 row_xmask:6 {EVERY}", DATA[THREAD ^ 6]),
        ("s_mov_b32 s8, 0x76543210\ns_mov_b32 s9, 0xfedcba98\nv_permlanex16_b32 v2, v2, s8, s9", DATA[THREAD ^ 16]),
        ("s_mov_b32 s8, 0x67452301\ns_mov_b32 s9, 0xefcdab89\nv_permlane16_b32 v2, v2, s8, s9", DATA[THREAD ^ 1]),
        # Half a register of shared memory; the other half stays.
        ("ds_store_b32 v1, v2\nv_mov_b32 v2, 7\nds_load_u16_d16_hi v2, v1", DATA << np.uint32(16) | np.uint32(7)),
        ("ds_store_b32 v1, v2\nds_load_i8 v2, v1 offset:1", (DATA >> 8).astype(np.int8).astype(np.int32)),
        ("ds_store_b32 v1, v2\nds_load_2addr_b32 v[1:2], v1 offset0:0 offset1:0\nv_lshlrev_b32 v1, 2, v0", DATA),
        ("scratch_store_b32 off, v2, off offset:4\nscratch_load_b32 v2, off, off offset:4", Fault),
    ],
)
def test_rdna(target, body, expected):
    if expected is Fault:
        with pytest.raises(Fault, match="access to byte 4 of 0 bytes of scratch memory"):
            execute(target, body)
    else:
        assert np.array_equal(execute(target, body), expected.astype(np.uint32))


@pytest.mark.parametrize("target", amd.targets("gfx1100", "gfx942"))
def test_an_atomic_operation_gives_what_was_there(target):
    names = {
        "gfx1100": "global_atomic_add_u32 v2, v3, v4, s[4:5] glc",
        "gfx942": "global_atomic_add v2, v3, v4, s[4:5] sc0",
    }
    out = execute(target, f"v_mov_b32 v3, 0\nv_mov_b32 v4, 2\n{names[target]}\ns_waitcnt vmcnt(0)")
    assert np.array_equal(out, DATA[0] + 2 * THREAD.astype(np.uint32))


# Each thread reads what the thread of another wave wrote.
EXCHANGE = """
ds_store_b32 v1, v2
s_waitcnt lgkmcnt(0)
s_barrier
v_xor_b32 v3, 0x100, v1
ds_load_b32 v2, v3
"""


@pytest.mark.parametrize("target", amd.targets("gfx1100", "gfx942"))
@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("", "", None),
        ("s_barrier\n", "", "shared memory is read that nobody wrote"),
        (
            "s_barrier\nv_xor_b32 v3, 0x100",
            "v_and_b32 v3, 0xff",
            r"race in shared memory: warp \d reads what warp \d wrote, with no barrier",
        ),
        ("0x100", "0x200", "shared memory is read that nobody wrote"),
        ("0x100", "0x400", r"access to byte \d+ of 1024 bytes of shared memory"),
        (
            "v2, v3\n",
            "v2, v3\nv_add_u32 v1, 4, v1\n",
            "store of 4 bytes outside of all tensors by 1 threads, 512 bytes",
        ),
        ("v2, v3\n", "v2, v3\nglobal_load_b32 v4, v1, s[4:5] offset:4\n", "load of 4 bytes outside of all tensors"),
    ],
)
def test_what_is_wrong_is_found(target, old, new, found):
    body = EXCHANGE.replace(old, new) if old else EXCHANGE
    if target == "gfx942":
        for rdna, cdna in (("ds_store", "ds_write"), ("ds_load", "ds_read"), ("global_load_b32", "global_load_dword")):
            body = body.replace(rdna, cdna)
    else:
        body = body.replace("v_add_u32", "v_add_nc_u32")
    if found is None:
        assert np.array_equal(execute(target, body), DATA[THREAD ^ 64])
    else:
        with pytest.raises(Fault, match=found):
            execute(target, body)
