"""Blockwise 4-bit quantization: one scale per block, the nearest level, two codes per byte; then 8-bit scales.

The weight is flattened row by row and cut into blocks, so a block may cross rows and only the last block may be short.
Every step rounds like bitsandbytes 0.50 on the CPU (backends/default/ops.py, csrc/cpu_ops.cpp), bit for bit.
"""

from functools import cache, reduce

import torch
from torch import Tensor

from lightning_qlora.quantization.codebooks import Codebook, dynamic_map

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # the types that can be quantized and decoded to
NESTED_BLOCK_SIZE = 256  # scales that share one second-level scale (paper, section 3)
SMALLEST_SCALE = 1e-38  # divisor of a block of zeros
CHUNK = 1 << 17  # weights per step on a CPU: fp32 values that fit the L2 cache; a multiple of every block size


def block_absmax(flat: Tensor, block_size: int) -> Tensor:
    """The largest magnitude of each block: fp32 [n] -> fp32 [ceil(n / block_size)]."""
    full = flat.numel() - flat.numel() % block_size
    absmax = flat[:full].view(-1, block_size).abs().amax(1)
    if full < flat.numel():
        absmax = torch.cat([absmax, flat[full:].abs().amax().clamp(min=SMALLEST_SCALE)[None]])
    return absmax


def normalize(flat: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """Each value divided by its block's scale, in [-1, 1] up to rounding: fp32 [n] -> fp32 [n]."""
    full = flat.numel() - flat.numel() % block_size
    whole_blocks = flat[:full].view(-1, block_size)
    # As in bitsandbytes: whole blocks are multiplied by the reciprocal, a short last block is divided.
    inverse = 1.0 / absmax[: len(whole_blocks)].clamp(min=SMALLEST_SCALE)
    scaled = (whole_blocks * inverse[:, None]).view(-1)
    if full < flat.numel():
        scaled = torch.cat([scaled, flat[full:] / absmax[-1:]])
    return scaled


def pack(codes: Tensor) -> Tensor:
    """Two codes per byte, the first in the high half: uint8 [n] -> uint8 [n / 2]; n is even."""
    return (codes[::2] << 4) | codes[1::2]


def quantize_4bit(weight: Tensor, codebook: Codebook, block_size: int) -> tuple[Tensor, Tensor]:
    """Float weight of n values -> packed codes uint8 [ceil(n / 2)] and scales fp32 [ceil(n / block_size)]."""
    flat = weight.detach().reshape(-1)
    packed = flat.new_empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    absmax = flat.new_empty(-(-flat.numel() // block_size), dtype=torch.float32)
    step = _weights_per_step(flat)
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step].float()
        scales = block_absmax(chunk, block_size)
        absmax[start // block_size :][: scales.numel()] = scales
        values = normalize(chunk, scales, block_size)
        if values.numel() % 2:
            values = torch.cat([values, values.new_zeros(1)])
        codes = torch.zeros_like(values, dtype=torch.uint8)
        for bound in codebook.bounds.tolist():
            codes += values > bound  # counts the midpoints below the value: the rank of its level
        packed[start // 2 :][: values.numel() // 2] = pack(codebook.order[codes.int()])
    return packed, absmax


def dequantize_4bit(out: Tensor, packed: Tensor, absmax: Tensor, codebook: Codebook, block_size: int) -> Tensor:
    """w = level[code] * scale, the product rounded to fp32 and then to the type of `out`, flat [n]; returns `out`."""
    step = _weights_per_step(out)
    pairs = packed.new_empty(min(step // 2, packed.numel()), dtype=torch.int64)
    for start in range(0, out.numel(), step):
        codes = packed[start // 2 : (start + step) // 2].int()
        levels = torch.index_select(codebook.pairs, 0, codes, out=pairs[: codes.numel()])
        values = levels.view(torch.float32)[: out.numel() - start]
        scales = absmax[start // block_size :]
        full = values.numel() - values.numel() % block_size
        values[:full].view(-1, block_size).mul_(scales[: full // block_size, None])
        values[full:].mul_(scales[-1])  # a short last block
        out[start : start + step].copy_(values)
    return out


def _weights_per_step(like: Tensor) -> int:
    if like.device.type == "cpu":
        return CHUNK
    return 128 * CHUNK  # few launches, with 400 MB of temporaries


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """Scales fp32 [b] -> 8-bit codes uint8 [b], second-level scales fp32 [ceil(b / 256)], and the subtracted mean.

    The value is first rounded to a grid of 65,536 points, then to the nearest level (bitsandbytes csrc/cpu_ops.cpp).
    The result can therefore be the neighbour of the nearest level.
    """
    offset = mean_in_fixed_order(absmax)
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCK_SIZE))
    blocks = padded.view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / nested_absmax)[:, None]).clamp(-1, 1)
    grid = ((scaled + 1.0) * 0.5 * 65535.0 + 0.5).nan_to_num().int()  # NaN, of a block of zeros, becomes 0
    codes = codes_of_grid(grid).view(-1)[: absmax.numel()]
    return codes.to(torch.uint8), nested_absmax, offset.item()


def codes_of_grid(places: Tensor) -> Tensor:
    """The code of the dynamic level nearest to each grid point: int32, 0 to 65,535 -> int32."""
    levels = dynamic_map(device=places.device)
    midpoints = (levels[:-1] + levels[1:]) * 0.5
    return torch.bucketize(-1.0 + 2.0 * places / 65535.0, midpoints, out_int32=True)


@cache
def code_of_place(device: str = "cpu") -> Tensor:
    """`codes_of_grid` of all grid points, uint8 [65536]: the lookup table of the C and Triton kernels."""
    return codes_of_grid(torch.arange(65536, dtype=torch.int32, device=device)).to(torch.uint8)


def nested_bytes(nested_absmax: Tensor, offset: float) -> Tensor:
    """Second-level scales and the offset as a layer stores them: fp32 [n] and a float -> uint8 [4 (n + 1)]."""
    return torch.cat([nested_absmax, nested_absmax.new_tensor([offset])]).view(torch.uint8)


def dequantize_absmax(
    codes: Tensor,
    nested_absmax: Tensor,
    offset: float | Tensor,
    numbers: Tensor | None = None,
) -> Tensor:
    """scale = level[code] * second-level scale, rounded, then + offset, rounded; uint8 [b] -> fp32 [b].

    `numbers`: the number of each block in the whole weight, [b]; None: 0 to b - 1.
    """
    if numbers is None:
        per_block = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()]
    else:
        per_block = nested_absmax[numbers // NESTED_BLOCK_SIZE]
    return dynamic_map(device=codes.device)[codes.int()].mul_(per_block).add_(offset)


def mean_in_fixed_order(values: Tensor) -> Tensor:
    """The mean of fp32 [n], with the same order of additions on every device and for any number of threads.

    The order is that of `torch.sum` on one x86 core (aten/native/cpu/SumKernel.cpp, cascade_sum). The result equals
    bitsandbytes' if bitsandbytes ran on one core or had fewer than 32,768 scales; otherwise the last bit may differ.
    """
    n = values.numel()
    lanes = 8
    if n < 8:
        lanes = 1
    unrolled = 4
    rows = n // (lanes * unrolled)
    step = 1 << max(4, max(rows - 1, 0).bit_length() // 4)
    vectors = values[: n // lanes * lanes].view(-1, lanes)
    body = _cascade(vectors[: rows * unrolled].view(rows, unrolled, lanes), step)
    first = _in_order([body[0], *vectors[rows * unrolled :]])
    per_lane = _in_order([first, *body[1:]])
    rest = _in_order([values.new_zeros(()), *values[n // lanes * lanes :]])
    # Divide by a tensor: for a Python number, a GPU multiplies by the rounded reciprocal, which can change the last bit
    # (torch's BinaryDivTrueKernel.cu).
    return _in_order([rest, *per_lane]) / values.new_full((), n)


def _cascade(rows: Tensor, step: int) -> Tensor:
    """Sum over dim 0 in groups of `step`, then twice over groups of groups; the rest of each level is added last."""
    sums = []
    for _ in range(3):
        groups = len(rows) // step
        sums.append(_in_order([rows.new_zeros(rows.shape[1:]), *rows[groups * step :]]))
        rows = _in_order(list(rows[: groups * step].view(groups, step, *rows.shape[1:]).unbind(1)))
    sums.append(_in_order([torch.zeros_like(sums[0]), *rows]))
    return _in_order(sums)


def _in_order(terms: list[Tensor]) -> Tensor:
    return reduce(torch.add, terms)
