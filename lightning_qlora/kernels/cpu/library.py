"""Call the C kernels of `c/` with tensors; `compiled_library()` is None if they could not be compiled."""

import ctypes
import logging
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels.cpu import build
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.products import cast
from lightning_qlora.kernels.reference import dropout_threshold
from lightning_qlora.kernels.scratch import scratch
from lightning_qlora.quantization import blockwise
from lightning_qlora.quantization.codebooks import codebook, dynamic_map
from lightning_qlora.quantization.packed_weight import PackedBytes, aligned

SOURCE = Path(__file__).parent / "c" / "kernels.c"
OFF = "LIGHTNING_QLORA_NO_BUILD"  # environment variable: compile nothing, compute with torch alone
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Up to how many rows `lora_linear` is as fast as decoding and torch's product. At 64 rows it takes 0.35 to 0.49 of that
# time in fp32, and 0.82 to 0.98 in bf16 with bf16 instructions (benchmarks.few_rows, AMD EPYC, 30 November 2026).
MOST_ROWS = 64  # as many as c/many_rows.h has room for
MOST_ROWS_NEON = 16  # in fp32 alone; nothing was measured
SMALL = 1 << 15  # number of weights up to which one thread is faster than two

# Arguments of the functions: p pointer, l int64, i int, f float.
ARGUMENTS = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
SIGNATURES = {
    "dequantize": "ppii",
    "lora_linear": "pppilpippplfpi",
    "quantize": "pillppppi",
    "quantize_scales": "plfppp",
    "dropout": "ppillifi",
}
_log = logging.getLogger("lightning_qlora")


class _Weight(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("packed", "absmax", "nested", "levels", "dynamic", "offset"))
    _fields_ += tuple((name, ctypes.c_int64) for name in ("rows", "columns", "block_shift"))


class Library:
    def __init__(self, loaded: ctypes.CDLL) -> None:
        for name, letters in SIGNATURES.items():
            if hasattr(loaded, name):
                function = getattr(loaded, name)
                function.argtypes = [ARGUMENTS[letter] for letter in letters]
                function.restype = None
        self.form = _form(loaded)
        if not loaded.has_threads():
            self.form += ", one thread"
        self.types = {dtype: code for dtype, code in TYPES.items() if dtype is not torch.float16 or loaded.has_fp16()}
        self._most_rows: dict[torch.dtype, int] = {}
        if hasattr(loaded, "lora_linear"):
            self._most_rows = dict.fromkeys(self.types, MOST_ROWS)
            if "NEON" in self.form:
                self._most_rows = {torch.float32: MOST_ROWS_NEON}
        self._loaded = loaded

    def dequantize_into(self, out: Tensor, weight: PackedBytes) -> Tensor:
        struct, _keep = _describe(weight)
        self._loaded.dequantize(ctypes.byref(struct), out.data_ptr(), TYPES[out.dtype], _threads(weight.numel))
        return out

    def is_fast_for(self, m: int, dtype: torch.dtype) -> bool:
        """Whether `lora_linear` was measured to be as fast as decoding and torch's product for m rows."""
        return 0 < m <= self._most_rows.get(dtype, 0)

    def lora_linear(
        self, y: Tensor, x: Tensor, weight: PackedBytes, bias: Tensor | None, lora: LoRA, xa: Tensor | None = None
    ) -> Tensor:
        """y = x W^T + bias + s xa B^T, rounded once, decoding W in registers or in the L1 cache.

        y [m, out] is contiguous. xa is in the type of x; None: x A^T, without dropout.
        """
        struct, _keep = _describe(weight)
        x = x.contiguous()
        lora_b = _fp32(lora.b)
        m, width = x.shape
        r = lora_b.shape[1]
        lora_a = None
        if xa is None:
            lora_a = _fp32(lora.a)
        else:
            xa = xa.contiguous()
        workspace = scratch(2 * (m + 3) * (width + r + 16), torch.float32, x.device, "rows")
        bias_type = 0
        if bias is not None:
            if bias.dtype not in self.types:
                bias = bias.float()
            bias = bias.contiguous()
            bias_type = TYPES[bias.dtype]
        self._loaded.lora_linear(
            ctypes.byref(struct),
            x.data_ptr(),
            y.data_ptr(),
            TYPES[x.dtype],
            m,
            _address(bias),
            bias_type,
            _address(xa),
            _address(lora_a),
            lora_b.data_ptr(),
            r,
            lora.scaling,
            workspace.data_ptr(),
            _threads(weight.numel),
        )
        return y

    def quantize(self, weight: Tensor, quant_type: QuantType, block_size: int, double_quant: bool) -> PackedBytes:
        book = codebook(quant_type)
        flat = weight.reshape(-1).contiguous()
        packed = flat.new_empty((flat.numel() + 1) // 2, dtype=torch.uint8)
        absmax = flat.new_empty(-(-flat.numel() // block_size), dtype=torch.float32)
        self._loaded.quantize(
            flat.data_ptr(),
            TYPES[flat.dtype],
            flat.numel(),
            block_size.bit_length() - 1,
            book.bounds.data_ptr(),
            book.order.data_ptr(),
            packed.data_ptr(),
            absmax.data_ptr(),
            _threads(flat.numel()),
        )
        scales = absmax
        nested = absmax.new_empty(0)
        if double_quant:
            scales = packed.new_empty(absmax.numel())
            nested = absmax.new_empty(-(-absmax.numel() // blockwise.NESTED_BLOCK_SIZE) + 1)
            nested[-1] = blockwise.mean_in_fixed_order(absmax)
            self._loaded.quantize_scales(
                absmax.data_ptr(),
                absmax.numel(),
                nested[-1].item(),
                blockwise.code_of_place().data_ptr(),
                scales.data_ptr(),
                nested.data_ptr(),
            )
        shape = (weight.shape[0], weight.shape[1])
        return PackedBytes(packed, scales.view(torch.uint8), nested.view(torch.uint8), shape, quant_type, block_size)

    def dropout_into(self, out: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
        """See `reference.dropout`; `out` may be `x`, both contiguous."""
        n = x.numel()
        self._loaded.dropout(
            x.data_ptr(), out.data_ptr(), TYPES[x.dtype], n, seed.item(), *dropout_threshold(p), _threads(n)
        )
        return out


def is_off() -> bool:
    return os.environ.get(OFF, "") not in ("", "0")


@cache
def compiled_library() -> Library | None:
    """The library for this machine, compiled by the first call; None if there is no compiler or it failed."""
    if is_off():
        return None
    try:
        return Library(build.load(SOURCE, refuse=_too_new))
    except (build.BuildError, OSError) as error:
        _log.warning("C kernels not compiled, so 4-bit layers run in plain torch, which is slower: %s", error)
        return None


def _too_new(loaded: ctypes.CDLL) -> str | None:
    """Why a library must not be called: it has instructions that torch does not use here, so they may not exist."""
    capability = torch.backends.cpu.get_cpu_capability()
    form = _form(loaded)
    for name, sufficient in (("AVX-512", ("AVX512",)), ("AVX2", ("AVX512", "AVX2"))):
        if name in form and not capability.startswith(sufficient):
            return f"compiled for {form}, and torch uses {capability} on this processor"
    return None


def _form(loaded: ctypes.CDLL) -> str:
    loaded.form.restype = ctypes.c_char_p
    form: bytes = loaded.form()
    return form.decode()


def _describe(weight: PackedBytes) -> tuple[_Weight, list[Tensor]]:
    """The weight as a C struct, and the tensors that must stay alive while C reads them."""
    packed = weight.packed.contiguous()
    absmax = aligned(weight.absmax)
    nested = aligned(weight.nested)
    scales = nested.data_ptr() if nested.numel() else None
    offset = scales and scales + nested.numel() - 4
    levels, dynamic, tables = _levels(weight.quant_type)
    addresses = packed.data_ptr(), absmax.data_ptr(), scales, levels, dynamic, offset
    struct = _Weight(*addresses, *weight.shape, weight.block_size.bit_length() - 1)
    return struct, [packed, absmax, nested, *tables]


@cache
def _levels(quant_type: QuantType) -> tuple[int, int, list[Tensor]]:
    """Addresses of the 16 levels of a type and of the 256 levels of scales, and the tensors at these addresses.

    Their own caches may drop the tensors: of several first calls at the same time, `functools.cache` keeps one result.
    """
    levels = codebook(quant_type).levels
    dynamic = dynamic_map()
    return levels.data_ptr(), dynamic.data_ptr(), [levels, dynamic]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fp32(tensor: Tensor) -> Tensor:
    return cast(tensor, torch.float32).contiguous()


def _threads(numel: int) -> int:
    return torch.get_num_threads() if numel > SMALL else 1
