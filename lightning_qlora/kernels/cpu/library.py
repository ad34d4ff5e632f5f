"""Call the C kernels of `c/` with tensors; `compiled_library()` is None if they could not be compiled."""

import ctypes
import logging
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels.cpu import build
from lightning_qlora.kernels.lora import LoRA
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
MAX_STRUCTS = 4096  # descriptions of weights for C that are kept, by their addresses
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
        threads = torch.get_num_threads() if out.numel() > SMALL else 1
        self._loaded.dequantize(struct, out.data_ptr(), TYPES[out.dtype], threads)
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
        n, r = lora_b.shape
        lora_a = at_xa = at_a = None
        if xa is None:
            lora_a = _fp32(lora.a)
            at_a = lora_a.data_ptr()
        else:
            xa = xa.contiguous()
            at_xa = xa.data_ptr()
        workspace = scratch((2 * (m + 3), width + r + 16), torch.float32, x.device, "rows")
        at_bias = None
        bias_type = 0
        if bias is not None:
            if bias.dtype not in self.types:
                bias = bias.float()
            bias = bias.contiguous()
            at_bias = bias.data_ptr()
            bias_type = TYPES[bias.dtype]
        self._loaded.lora_linear(
            struct,
            x.data_ptr(),
            y.data_ptr(),
            TYPES[x.dtype],
            m,
            at_bias,
            bias_type,
            at_xa,
            at_a,
            lora_b.data_ptr(),
            r,
            lora.scaling,
            workspace.data_ptr(),
            torch.get_num_threads() if n * width > SMALL else 1,
        )
        return y

    def quantize(self, weight: Tensor, quant_type: QuantType, block_size: int, double_quant: bool) -> PackedBytes:
        book = codebook(quant_type)
        flat = weight.reshape(-1).contiguous()
        packed = flat.new_empty((flat.numel() + 1) // 2, dtype=torch.uint8)
        absmax = flat.new_empty(-(-flat.numel() // block_size), dtype=torch.float32)
        threads = torch.get_num_threads() if flat.numel() > SMALL else 1
        self._loaded.quantize(
            flat.data_ptr(),
            TYPES[flat.dtype],
            flat.numel(),
            block_size.bit_length() - 1,
            book.bounds.data_ptr(),
            book.order.data_ptr(),
            packed.data_ptr(),
            absmax.data_ptr(),
            threads,
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
        threads = torch.get_num_threads() if n > SMALL else 1
        self._loaded.dropout(
            x.data_ptr(), out.data_ptr(), TYPES[x.dtype], n, seed.item(), *dropout_threshold(p), threads
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


def _describe(weight: PackedBytes) -> tuple[Any, Any]:
    """A pointer to the weight as a C struct, and what must stay alive while C reads it."""
    packed, absmax, nested, shape, quant_type, block_size = weight
    if not (packed.is_contiguous() and absmax.is_contiguous() and nested.is_contiguous()) or (
        (absmax.data_ptr() | nested.data_ptr()) & 3
    ):
        packed, absmax, nested = packed.contiguous(), aligned(absmax), aligned(nested)
    addresses = packed.data_ptr(), absmax.data_ptr(), nested.data_ptr()
    struct = _struct(*addresses, nested.numel(), shape, quant_type, block_size)
    return struct[0], (packed, absmax, nested, struct)


@lru_cache(MAX_STRUCTS)
def _struct(
    packed: int, absmax: int, nested: int, size: int, shape: tuple[int, int], quant_type: QuantType, block_size: int
) -> tuple[Any, ...]:
    """For a weight at these addresses, whose second-level scales have `size` bytes."""
    levels, dynamic, tables = _levels(quant_type)
    scales, offset = (nested, nested + size - 4) if size else (None, None)
    struct = _Weight(packed, absmax, scales, levels, dynamic, offset, *shape, block_size.bit_length() - 1)
    return ctypes.byref(struct), struct, tables


@cache
def _levels(quant_type: QuantType) -> tuple[int, int, list[Tensor]]:
    """Addresses of the 16 levels of a type and of the 256 levels of scales, and the tensors at these addresses.

    Their own caches may drop the tensors: of several first calls at the same time, `functools.cache` keeps one result.
    """
    levels = codebook(quant_type).levels
    dynamic = dynamic_map()
    return levels.data_ptr(), dynamic.data_ptr(), [levels, dynamic]


def _fp32(matrix: Tensor) -> Tensor:
    if matrix.dtype is not torch.float32:
        matrix = matrix.float()
    return matrix.contiguous()
