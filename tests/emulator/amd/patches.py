"""tinygrad's emulator, with corrections in its source; each must apply, so that another version of it is noticed.

tinygrad's own kernels use few instructions, and Triton's use more. Each error was found by a result that differed from
the reference. All that is imported from tinygrad is imported here, because no other file knows where it is.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec

from tests.emulator.amd import FOLDER

NAME = "test.mockgpu.amd.emu"
CORRECTIONS = (
    # MFMA of 32 x 32: a lane has four rows of the result, then the four that are eight rows below them, and so on.
    # CDNA 3 ISA, "Matrix Arithmetic Instructions".
    (
        "m_base = c_grp * UOp.const(16, dtypes.int) + UOp.const((out_reg // 4) * 4 + out_reg % 4, dtypes.int)",
        "m_base = c_grp * UOp.const(4, dtypes.int) + UOp.const((out_reg // 4) * 8 + out_reg % 4, dtypes.int)",
    ),
    # MFMA of XF32 (TF32): its factors were taken for two of 16 bits. They are not rounded here.
    (
        "is_i8, is_f32_src = 'I8' in op_name, src_type == 'F32'",
        "is_i8, is_f32_src = 'I8' in op_name, src_type in ('F32', 'XF32')",
    ),
    # WMMA whose C is a constant, such as 0: its code was taken for the number of a vector register.
    (
        "src2_r = (src2_r >= 256).where(src2_r - _c(256), src2_r)",
        "src2_code, src2_r = src2_r, (src2_r >= 256).where(src2_r - _c(256), _c(0))",
    ),
    (
        "mat_c = [ctx.rvgpr_dyn(src2_r + _c(vgpr), UOp.const(lane, dtypes.int)).bitcast(out_dt)",
        "mat_c = [(src2_code >= 256).where(ctx.rvgpr_dyn(src2_r + _c(vgpr), UOp.const(lane, dtypes.int)), "
        "ctx.rsgpr_dyn((src2_code >= 256).where(_c(0), src2_code))).bitcast(out_dt)",
    ),
)


def _load():
    """The emulator with its corrections."""
    sys.path.insert(0, str(FOLDER))
    try:
        specification = find_spec(NAME)
        text = specification.loader.get_source(NAME)
        for wrong, right in CORRECTIONS:
            if text.count(wrong) != 1:
                raise ImportError(f"this version of tinygrad's emulator has no {wrong!r}")
            text = text.replace(wrong, right)
        module = module_from_spec(specification)
        exec(compile(text, specification.origin, "exec"), vars(module))
    finally:
        sys.path.remove(str(FOLDER))
    return module


emulator = _load()
decode = emulator.decode_inst
KernelDescriptor = import_module("tinygrad.runtime.autogen.amdgpu_kd").llvm_amdhsa_kernel_descriptor_t
load_elf = import_module("tinygrad.runtime.support.elf").elf_loader
# Buffer instructions of RDNA, which tinygrad does not decode; `accesses.py` executes them.
formats = import_module("tinygrad.renderer.amd")._load_formats()
formats["rdna3"].append(emulator.ir3.MUBUF)
formats["rdna4"].append(emulator.ir4.VBUFFER)
