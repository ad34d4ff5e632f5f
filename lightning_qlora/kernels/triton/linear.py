"""The 4-bit layer with its adapter, y = x W^T + bias + s (drop(x) A^T) B^T, and its gradients.

The order of the products is that of `eager.py`. W is decoded into one reused buffer per stream, and cuBLAS or hipBLASLt
multiplies. For few rows of x, as in generation, W is decoded inside the product, which reads it as 4 bits, never writes
it, and adds the bias. `tiles.json` says for how many rows.

    y^T[n, m] += bias[n] + sum over runs of k:  scale[n, run] * (sum over k in the run:  level[code[n, k]] * x[m, k])

The scale is constant over a run, so it multiplies the sum of the run, and the tensor cores multiply levels (rounded to
the 16-bit type of x). W is the left operand, which Hopper can read from registers. Several programs share the runs.

Launches: 4 forward (few rows: 3; many rows with a bias: 5), 5 backward, with or without dropout. The adapter in fp32
needs no 16-bit copies.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.half import Half, multiply, scaled_weight
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.scratch import scratch
from lightning_qlora.kernels.triton.half import scaled, to_half
from lightning_qlora.kernels.triton.launch import MAX_LAUNCHES, Launch, Tile, add_shares, find_tile, shared_launch
from lightning_qlora.kernels.triton.lora_products import in_16_bits, lora_down, lora_gradients, lora_up
from lightning_qlora.kernels.triton.quantize import dequantize_into, levels_of_codes, load_scales, weight_arguments
from lightning_qlora.quantization.packed_weight import PackedBytes


def lora_project(x: Tensor | Half, lora: LoRA) -> Tensor:
    return lora_down(x, _factor(lora.a, x), p=lora.p, seed=lora.seed)


def linear_into(
    out: Tensor, x: Tensor | Half, xa: Tensor, weight: PackedBytes, bias: Tensor | None, lora: LoRA
) -> None:
    h = _factor(xa, x)
    b = _factor(lora.b, x)
    if can_add_matmul(x, weight):
        lora_up(h, b, out, lora.scaling)
        add_matmul_(out, x, weight, bias)
        return
    if isinstance(x, Half):
        divided, factor = scaled_weight(weight, scaled)
        multiply(x.values, _decoded(divided, torch.float16).T, out)
        lora_up(h, b, out, lora.scaling, factors=(x.factor, factor))
    else:
        lora_up(h, b, out, lora.scaling)
        out.addmm_(x, _decoded(weight, x.dtype).T)
    if bias is not None:
        out.add_(bias)


def linear_backward(
    grad: Tensor | Half, x: Tensor | Half, xa: Tensor, weight: PackedBytes, lora: LoRA, needs_x: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    a, b, scaling, p, seed, _ = lora
    grad_xa = _factor(lora_down(grad, _factor(b, grad).T, scaling), grad)
    grad_a = a.new_empty(a.shape)  # contiguous, as torch.compile was told
    grad_b = b.new_empty(b.shape)
    lora_gradients(grad_xa, x, grad_a, _factor(xa, grad), grad, grad_b, scaling, p, seed)
    if not needs_x:
        return None, grad_a, grad_b
    a = _factor(a, grad).T
    if isinstance(grad, Half):
        divided, factor = scaled_weight(weight, scaled)
        grad_x = multiply(grad.values, _decoded(divided, torch.float16))
        return lora_up(grad_xa, a, grad_x, p=p, seed=seed, factors=(grad.factor, factor)), grad_a, grad_b
    grad_x = lora_up(grad_xa, a, grad.new_empty(x.shape), p=p, seed=seed)
    return grad_x.addmm_(grad, _decoded(weight, grad.dtype)), grad_a, grad_b


def _factor(matrix: Tensor, like: Tensor | Half) -> Any:
    """A matrix as it is multiplied: one of fp16 with a power of two if the other factor is."""
    return to_half(matrix) if isinstance(like, Half) else matrix


def _decoded(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    """W in the buffer of the stream, valid until the stream decodes the next weight."""
    buffer = scratch(weight.numel, dtype, weight.packed.device)
    return dequantize_into(buffer, weight).view(weight.shape)


@triton.jit
def _matmul_kernel(
    packed,
    absmax,
    nested,
    levels8,
    levels,
    x,
    bias,
    y,
    memory,
    factor,
    n_nested,
    m,
    n,
    k,
    shares,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    BIAS: tl.constexpr,
    HALF: tl.constexpr,
    RUN: tl.constexpr,
    SPLIT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """A program computes N x M sums over its share of the runs of RUN weights."""
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)  # of W
    column = tl.program_id(1) * M + tl.arange(0, M)  # of x^T
    share = tl.program_id(2)
    bytes_of_row = packed + row[:, None] * tl.multiple_of(k // 2, RUN // 2) + tl.arange(0, RUN // 2)[None, :]
    inputs_of_row = x + column.to(tl.int64)[:, None] * k + tl.arange(0, RUN)[None, :]
    table = tl.load(levels + tl.arange(0, 16))
    total = tl.zeros((N, M), tl.float32)
    runs = tl.cdiv(k // RUN, shares)
    for run in tl.range(share * runs, tl.minimum((share + 1) * runs, k // RUN)):
        codes = tl.load(bytes_of_row + run * (RUN // 2), mask=row[:, None] < n, other=0)
        level = levels_of_codes(codes, table, N, RUN).to(x.dtype.element_ty)
        inputs = tl.load(inputs_of_row + run * RUN, mask=column[:, None] < m, other=0.0)
        block = (row * k + run * RUN) // BLOCK_SIZE
        scales = load_scales(absmax, nested, n_nested, levels8, block, row < n, DOUBLE_QUANT)
        total += tl.dot(level, inputs.T) * scales[:, None]
    write = (row < n)[:, None] & (column < m)[None, :]
    if SPLIT:
        total, is_last = add_shares(total, memory, share, shares, N, M)
        write &= is_last
    if HALF:
        total *= tl.load(factor)
    place = y + column.to(tl.int64)[None, :] * n + row[:, None]
    total += tl.load(place, mask=write, other=0.0).to(tl.float32)
    if BIAS:
        total += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
    tl.store(place, total.to(y.dtype.element_ty), mask=write)


def can_add_matmul(x: Tensor | Half, weight: PackedBytes) -> bool:
    """Whether `add_matmul_` can compute x W^T, x [m, k], and the table of tiles says that it is fast."""
    whole_runs = weight.shape[1] % min(weight.block_size, 64) == 0
    m = x.shape[0]
    return whole_runs and in_16_bits(x) and m > 0 and bool(find_tile("matmul", x.device, m))


def add_matmul_(y: Tensor, x: Tensor | Half, weight: PackedBytes, bias: Tensor | None = None) -> Tensor:
    """y += x W^T + bias, rounded once; y [m, n] contiguous and x [m, k] of one 16-bit type, or fp32 and Half."""
    tensors, n_nested = weight_arguments(weight)
    m = x.shape[0]
    tile = find_tile("matmul", x.device, m)
    factor = y
    if isinstance(x, Half):
        rows, factor = x
    else:
        rows = x.contiguous()
    choices: Any = {"BIAS": bias is not None, "HALF": factor is not y}
    run = _matmul(x.device, tile, (n_nested, m, *weight.shape), weight.block_size, **choices)
    addend = y
    if bias is not None:
        addend = bias.contiguous()
    run((*tensors, rows, addend, y, run.memory(y), factor))
    return y


@lru_cache(MAX_LAUNCHES)
def _matmul(device: torch.device, tile: Tile, numbers: tuple[int, ...], block_size: int, **choices: Any) -> Launch:
    n_nested, m, n, k = numbers
    run = min(block_size, 64)
    grid = -(-n // tile["N"]), -(-m // tile["M"])
    return shared_launch(
        _matmul_kernel,
        device,
        grid,
        numbers,
        tile,
        k // run,
        tile["N"] * tile["M"],
        BLOCK_SIZE=block_size,
        DOUBLE_QUANT=n_nested >= 0,
        RUN=run,
        **choices,
    )
