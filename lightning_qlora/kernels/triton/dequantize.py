"""4-bit bytes to a float weight, in one launch.

    w[i] = level[code[i]] * scale[i // block_size]
    scale[b] = level8[code8[b]] * nested[b // 256] + offset        (or read as it is, without double quantization)

The table of levels is data, so one kernel serves NF4, FP4 and INT4. Every product and sum is rounded to fp32 by itself,
as bitsandbytes does, and only the result to the type asked for: hence `enable_fp_fusion=False` at the launch.
Layout of the bytes: `quantize/blockwise.py`. The same in torch: `kernels/reference.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.triton.tiles import launch_options, launching_on
from lightning_qlora.quantize.codebooks import codebook, dynamic_map
from lightning_qlora.quantize.packed import PackedBytes


@triton.jit
def load_scales(absmax, nested, n_nested, levels8, block, mask):
    """The fp32 scale of each block, from its 8-bit code or from its four bytes; nested[n_nested] is the offset."""
    if absmax.dtype.element_ty == tl.uint8:
        level8 = tl.load(levels8 + tl.load(absmax + block, mask=mask, other=0).to(tl.int32))
        scales = level8 * tl.load(nested + block // 256, mask=mask, other=0.0) + tl.load(nested + n_nested)
    else:
        scales = tl.load(absmax + block, mask=mask, other=0.0)
    return scales


@triton.jit
def _dequantize_kernel(
    packed, absmax, nested, n_nested, levels8, levels, out, n,
    RUN: tl.constexpr, RUNS_PER_BLOCK: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """A program decodes RUNS runs of RUN weights that share one scale, eight codes to a 4-byte word.

    Threads load and store 16 bytes at a time, so what moves between them is the words, not the weights they become.
    """
    UNIT: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth  # weights of one 16-byte store
    first = tl.program_id(0).to(tl.int64) * RUNS * RUN  # the only 64-bit index: the rest count from here, in 32 bits
    left = tl.minimum(n - first, RUNS * RUN).to(tl.int32)
    run = tl.arange(0, RUNS)
    begins = run * RUN < left
    scales = load_scales(absmax, nested, n_nested, levels8, (first // RUN + run) // RUNS_PER_BLOCK, begins)
    word = run[:, None] * (RUN // 8) + tl.arange(0, RUN // 8)[None, :]
    place = tl.arange(0, UNIT)
    unit = run[:, None] * (RUN // UNIT) + tl.arange(0, RUN // UNIT)[None, :]
    weight = unit[:, :, None] * UNIT + place[None, None, :]
    if packed.dtype.element_ty == tl.int32:
        mask = begins[:, None, None]
        words = tl.load(packed + first // 8 + word, mask=begins[:, None], other=0, eviction_policy="evict_first")
        # A word's eight codes make 8 / UNIT units: the words again, one for each unit, its codes shifted to the bottom.
        words = words[:, :, None] >> (tl.arange(0, 8 // UNIT) * 4 * UNIT)[None, None, :]
        words = tl.reshape(words, (RUNS, RUN // UNIT, 1))
        codes = (words >> ((place * 4) ^ 4)[None, None, :]) & 15  # ^ 4: the first code is a byte's high half
    else:  # the last run is not whole, or the bytes begin off a 4-byte border
        mask = weight < left
        bytes = tl.load(packed + first // 2 + weight // 2, mask=mask, other=0).to(tl.int32)
        codes = (bytes >> ((place % 2 * 4) ^ 4)[None, None, :]) & 15
    level = tl.gather(tl.load(levels + tl.arange(0, 16)), tl.reshape(codes, (RUNS * RUN,)), 0)
    weights = tl.reshape(level, (RUNS, RUN // UNIT, UNIT)) * scales[:, None, None]
    tl.store(out + first + weight, weights.to(out.dtype.element_ty), mask=mask)


def scale_arguments(weight: PackedBytes) -> tuple[Tensor, Tensor, int, Tensor]:
    """What `load_scales` reads: absmax, nested, n_nested and levels8."""
    absmax, nested = weight.absmax.reshape(-1), weight.nested.reshape(-1).view(torch.float32)
    if not nested.numel():
        absmax = absmax.view(torch.float32)
    return absmax, nested, max(nested.numel() - 1, 0), dynamic_map(device=str(absmax.device))


def dequantize_into(out: Tensor, weight: PackedBytes) -> Tensor:
    """Decode into `out`, flat [numel], of any of the three float types; returns it."""
    device, n, packed = weight.packed.device, weight.numel, weight.packed.reshape(-1)
    run = min(weight.block_size, 64)  # longer blocks are several runs, so that one tile serves every block size
    if n % run == 0 and packed.data_ptr() % 4 == 0:
        packed = packed.view(torch.int32)
    tile = launch_options("dequantize", device)
    runs = tile.pop("WEIGHTS") // run
    if packed.dtype == torch.uint8:
        runs //= 4  # byte by byte takes more registers a weight
    with launching_on(device):
        _dequantize_kernel[(triton.cdiv(n, runs * run),)](
            packed, *scale_arguments(weight), codebook(weight.quant_type, str(device)).levels, out, n,
            RUN=run, RUNS_PER_BLOCK=weight.block_size // run, RUNS=runs, enable_fp_fusion=False, **tile,
        )  # fmt: skip
    return out


def dequantize(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    """The decoded weight in fresh memory, [out, in]."""
    out = torch.empty(weight.numel, dtype=dtype, device=weight.packed.device)
    return dequantize_into(out, weight).view(weight.shape)
