"""What is true of AMD's machine code alone. The kernels, bugs and barriers are in the other files, for all targets."""

from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton.backends.amd.compiler import HIPBackend

from benchmarks.products import add_matmul_
from lightning_qlora.kernels import reference, scratch
from tests.emulator import amd
from tests.emulator.driver import emulated
from tests.emulator.machine import UnknownInstruction
from tests.emulator.memory import Fault
from tests.emulator.test_mutations import S_NOP, orders
from tests.toys import needs

pytestmark = [needs("triton", "3.7", "the emulator knows its code")]
WAIT_FOR_STORES = b"\x00\x00\x7c\xbc"  # s_waitcnt_vscnt null, 0 of RDNA 3


@pytest.fixture
def product():
    """A product of few rows. The sums of several programs are shared, as they are not on AMD."""
    torch.manual_seed(0)
    x, weight = torch.randn(7, 512).bfloat16(), reference.quantize(torch.randn(66, 512), "nf4", 64, True)
    scratch.release()

    def compute():
        torch.version.hip = None
        return add_matmul_(torch.zeros(7, 66).bfloat16(), x, weight)

    yield compute, x.float() @ reference.dequantize(weight, torch.float32).T
    scratch.release()


@pytest.mark.parametrize("target", amd.targets("gfx942"))
def test_sums_that_programs_share_race_on_cdna(target, product):
    """As the docstring of `number_of_shares` says: the wave that counts has not waited for the stores of the others.

    They wait for themselves, but after the barrier, so that the count does not release these stores.
    """
    with emulated(target), pytest.raises(Fault, match=r"race: block \d loads what block \d stored, .* not released"):
        product[0]()


@pytest.mark.parametrize("target", amd.targets("gfx1100", "gfx1201"))
def test_sums_that_programs_share_do_not_race_on_rdna(target, product):
    with emulated(target):
        assert (product[0]() - product[1]).abs().max() < 2e-2 * product[1].abs().max()


@pytest.mark.parametrize("target", amd.targets("gfx1100"))
def test_without_waits_for_stores_they_would(target, product):
    with emulated(target) as emulation:
        emulation.change = lambda code: code.replace(WAIT_FOR_STORES, S_NOP)
        with pytest.raises(Fault, match="its warp has not waited for the store"):
            product[0]()


@pytest.mark.parametrize("target", amd.targets())
def test_an_unknown_instruction_is_named(target, product):
    with emulated(target) as emulation:
        emulation.change = lambda code: orders(target, code)[0].re.sub(b"\xff\xff\xff\xff", code)
        with pytest.raises(UnknownInstruction, match=r"AMD instruction is not known: unknown .* word=0xffffffff"):
            product[0]()


# Each thread loads a word of the first array to v2, and stores v2 to the second array; v1 is its place in bytes.
CODE = """
s_load_b128 s[4:7], s[0:1], 0x0
s_waitcnt lgkmcnt(0)
v_lshlrev_b32 v1, 2, v0
global_load_b32 v2, v1, s[4:5]
s_waitcnt vmcnt(0)
{body}
s_waitcnt lgkmcnt(0)
global_store_b32 v1, v2, s[6:7]
s_endpgm
"""
OF_CDNA = {"_b128": "_dwordx4", "l_load_b32": "l_load_dword", "l_store_b32": "l_store_dword"}  # other names there
OF_CDNA |= {"ds_store": "ds_write", "ds_load": "ds_read", "v_add_nc_u32": "v_add_u32"}
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
THREAD = np.arange(THREADS, dtype=np.uint32)


def execute(target, body):
    """The second array; each thread has loaded its number in bytes from the first."""
    code = CODE.format(body=body)
    directive = ".amdhsa_wavefront_size32 1"
    if target == "gfx942":
        directive = ".amdhsa_accum_offset 16"
        for rdna, cdna in OF_CDNA.items():
            code = code.replace(rdna, cdna)
    text = KERNEL.format(target=target, code=code, directive=directive)
    machine, *_ = (import_module(f"tests.emulator.amd.{name}") for name in ("machine", "accesses", "lanes"))
    program = machine.Program(HIPBackend.make_hsaco(text, {}, SimpleNamespace(arch=target)), target)
    data, out = THREAD.copy(), np.zeros(THREADS, np.uint32)
    ranges = [(array.ctypes.data, array.ctypes.data + array.nbytes) for array in (data, out)]
    values = [array.ctypes.data.to_bytes(8, "little") for array in (data, out)]
    machine.run(program, (1, 1, 1), THREADS, 0, values, ranges)
    return out


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
        ("s_barrier", "s_barrier", None),
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
            "v2, v3\nv_add_nc_u32 v1, 4, v1\n",
            "store of 4 bytes outside of all tensors by 1 threads, 512 bytes",
        ),
        ("v2, v3\n", "v2, v3\nglobal_load_b32 v4, v1, s[4:5] offset:4\n", "load of 4 bytes outside of all tensors"),
    ],
)
def test_what_is_wrong_is_found(target, old, new, found):
    body = EXCHANGE.replace(old, new)
    if found is None:
        assert np.array_equal(execute(target, body), THREAD ^ 64)
    else:
        with pytest.raises(Fault, match=found):
            execute(target, body)


@pytest.mark.parametrize("target", amd.targets("gfx1100"))
def test_an_access_outside_of_scratch_memory_is_found(target):
    with pytest.raises(Fault, match="access to byte 4 of 0 bytes of scratch memory"):
        execute(target, "scratch_store_b32 off, v2, off offset:4")
