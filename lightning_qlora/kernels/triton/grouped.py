"""The 4-bit layers of all experts in one launch each: row i of x goes through the layer of its expert.

    out[i] = x[i] W_e^T + s (drop(x[i]) A_e^T) B_e^T        for ends[e - 1] <= i < ends[e], zero from the last end on

The rows are sorted by expert, and `ends` is on the device, so the host needs not know how many rows an expert has. The
grid is as large as it can be needed for any ends; each program finds its expert from them. W is decoded inside, tile by
tile, so an expert with many rows is decoded several times, and nothing of W's size is allocated. The same in torch:
`reference.grouped_linear`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.half import Half, scaled_weight, to_half
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.triton.adapter_sums import sum_over_columns, sum_over_ranks, sum_over_rows
from lightning_qlora.kernels.triton.dropout import MASK, NO_DROPOUT, dropout_arguments, is_kept
from lightning_qlora.kernels.triton.half import take_out
from lightning_qlora.kernels.triton.launch import find_tile, launch_of
from lightning_qlora.kernels.triton.lora_products import rank_tile
from lightning_qlora.kernels.triton.quantize import levels_of_codes, load_scales, tables_of_levels
from lightning_qlora.quantization.packed_weight import PackedBytes


@triton.jit
def _find_rows(ends, experts, tile, EXPERTS: tl.constexpr, M: tl.constexpr):
    """Expert, first row and end of the rows of a tile of at most M rows; expert is `experts` or more past the last."""
    index = tl.arange(0, EXPERTS)
    known = index < experts
    end = tl.load(ends + index, mask=known, other=0)
    begin = tl.load(ends + index - 1, mask=known & (index > 0), other=0)
    tiles = tl.cdiv(end - begin, M)
    until = tl.cumsum(tiles, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    mine = index == expert
    return (
        expert,
        tl.sum(tl.where(mine, begin + (tile - until + tiles) * M, 0), 0),
        tl.sum(tl.where(mine, end, 0), 0),
    )


@triton.jit(do_not_specialize=MASK)
def _product_kernel(
    packed, absmax, nested, levels8, levels, lora, ends, x, h, out, w_factor, lora_factor, x_factor, h_factor,
    n_nested, experts, n, k, r, low, high, least_kept, s,
    BACKWARD: tl.constexpr, BLOCK_SIZE: tl.constexpr, DOUBLE_QUANT: tl.constexpr, DROPOUT: tl.constexpr,
    EXPERTS: tl.constexpr, HALF: tl.constexpr, RUN: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program computes x W^T + s h B^T for M rows and N outputs, or backward x W + s drop(h A) for RUN inputs."""
    expert, first, end = _find_rows(ends, experts, tl.program_id(0), EXPERTS, M)
    if expert < experts:
        number = expert.to(tl.int64)
        packed = tl.multiple_of(packed + number * n * (k // 2), 16)
        absmax += number * tl.cdiv(n * k, BLOCK_SIZE) * (1 if DOUBLE_QUANT else 4)
        nested += number * (n_nested + 1) * 4
        values = tl.load(levels + tl.arange(0, 16))
        row = first + tl.arange(0, M)
        inside = row < end
        COLUMNS: tl.constexpr = RUN if BACKWARD else N
        total = tl.zeros((M, COLUMNS), tl.float32)
        steps = tl.cdiv(n, N) if BACKWARD else k // RUN
        tl.assume((steps > 0) & (r > 0))  # else sums of zeros, from paths past the loops, take registers
        for step in tl.range(0, steps):
            output = (step if BACKWARD else tl.program_id(1)) * N + tl.arange(0, N)
            run = tl.program_id(1) if BACKWARD else step
            at = packed + output.to(tl.int64)[:, None] * tl.multiple_of(k // 2, RUN // 2) + run * (RUN // 2)
            codes = tl.load(at + tl.arange(0, RUN // 2)[None, :], mask=(output < n)[:, None], other=0)
            block = (output.to(tl.int64) * k + run * RUN) // BLOCK_SIZE
            scales = load_scales(absmax, nested, n_nested, levels8, block, output < n, DOUBLE_QUANT)
            weight = (levels_of_codes(codes, values, N, RUN) * scales[:, None]).to(x.dtype.element_ty)
            if BACKWARD:
                at = x + row.to(tl.int64)[:, None] * n + output[None, :]
                inputs = tl.load(at, mask=inside[:, None] & (output < n)[None, :], other=0.0)
            else:
                at = x + row.to(tl.int64)[:, None] * k + (run * RUN + tl.arange(0, RUN))[None, :]
                inputs = tl.load(at, mask=inside[:, None], other=0.0)
                weight = weight.T
            total += tl.dot(inputs, weight, input_precision="ieee")
        # The adapter: B [n, r], or backward A [r, k] as [k, r].
        width = k if BACKWARD else n
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        rank_stride = k if BACKWARD else 1
        stride = 1 if BACKWARD else r
        matrix = lora + number * r * width
        added = sum_over_ranks(h, matrix, row, end, column, width, r, rank_stride, stride, R, M, COLUMNS)
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        if DROPOUT:
            added = tl.where(is_kept(place, low, high, least_kept), added, 0.0)
        if HALF:
            total = take_out(total, x_factor, w_factor)
            added = take_out(added, h_factor, lora_factor)
        total += added * s
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside[:, None] & (column < width)[None, :])


@triton.jit(do_not_specialize=MASK)
def _project_kernel(
    lora, ends, x, out, lora_factor, x_factor, experts, k, r, rank_stride, stride, low, high, least_kept, s,
    BACKWARD: tl.constexpr, DROPOUT: tl.constexpr, EXPERTS: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A program computes s drop(x) A^T, or backward s x B, for M rows and R ranks."""
    expert, first, end = _find_rows(ends, experts, tl.program_id(0), EXPERTS, M)
    if expert < experts:
        matrix = lora + expert.to(tl.int64) * r * k
        row, rank = first + tl.arange(0, M), tl.program_id(1) * R + tl.arange(0, R)
        total = sum_over_columns(
            x, matrix, x, row, end, rank, r, k, 0, tl.cdiv(k, K), rank_stride, stride, low, high, least_kept,
            DROPOUT, False, R, M, K,
        )  # fmt: skip
        if HALF:
            total = take_out(total, x_factor, lora_factor)
        place = row.to(tl.int64)[:, None] * r + rank[None, :]
        tl.store(out + place, (total * s).to(out.dtype.element_ty), mask=(row < end)[:, None] & (rank < r)[None, :])


@triton.jit(do_not_specialize=MASK)
def _gradients_kernel(
    ends, h, x, out, h_factor, x_factor, n, r, rank_stride, stride, low, high, least_kept, s,
    DROPOUT: tl.constexpr, HALF: tl.constexpr, R: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program computes s h^T drop(x) of the rows of one expert, for R ranks and N columns; zeros without rows."""
    expert = tl.program_id(2)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    column, rank = tl.program_id(0) * N + tl.arange(0, N), tl.program_id(1) * R + tl.arange(0, R)
    total = sum_over_rows(
        h, x, first, end, rank, r, column, n, 0, tl.cdiv(end - first, M), low, high, least_kept, DROPOUT, R, M, N
    )
    if HALF:
        total = take_out(total, h_factor, x_factor)
    at = out + expert.to(tl.int64) * r * n + rank[:, None] * rank_stride + column[None, :] * stride
    tl.store(at, (total * s).to(out.dtype.element_ty), mask=(rank < r)[:, None] & (column < n)[None, :])


def can_group(x: Tensor, weight: PackedBytes, lora: LoRA) -> bool:
    """Whether the kernels can compute these experts: whole runs, contiguous, at addresses that are a multiple of 16."""
    run = min(weight.block_size, 64)
    tensors = (*weight[:3], lora.a, lora.b)
    return (
        bool(find_tile("grouped", x.device))
        and weight.shape[-1] % run == 0
        and all(tensor.data_ptr() % 16 == 0 and tensor.is_contiguous() for tensor in tensors)
    )


class Group:
    """What the launches for one call have in common; `half`: all factors are of `Half`, and all results fp32."""

    def __init__(self, rows: int, ends: Tensor, weight: PackedBytes, lora: LoRA, half: bool = False) -> None:
        self.ends = ends
        self.device = ends.device
        self.half = half
        self.weight = weight
        self.lora_a = self.factor(lora.a)
        self.lora_b = self.factor(lora.b)
        self.dtype = lora.a.dtype
        self.scaling = lora.scaling
        self.dropout = dropout_arguments(lora.p, lora.seed, self.device)
        self.has_dropout = lora.seed is not None
        self.experts, self.r, _ = lora.a.shape
        self.rank = rank_tile(self.r)
        self.tile = find_tile("grouped", self.device, rows // self.experts)
        self.tiles = rows // self.tile["M"] + min(rows, self.experts)  # of M rows: no more, whatever the ends are

    def factor(self, x: Tensor | Half) -> Half:
        """A matrix as the kernels get it, which read the power of two only if `half`."""
        if isinstance(x, Half):
            return x
        return to_half(x) if self.half else Half(x, x)

    def new_zeros(self, x: Half, columns: int) -> Tensor:
        dtype = torch.float32 if self.half else x.values.dtype
        return x.values.new_zeros(x.shape[0], columns, dtype=dtype)

    def product(self, x: Half, h: Half, backward: bool) -> Tensor:
        """x W^T + s h B^T, or backward x W + drop(h A): [rows, out], or [rows, in]."""
        weight = self.weight
        w_factor = x.factor
        if self.half:
            weight, w_factor = scaled_weight(weight)
        _, n, k = weight.shape
        run = min(weight.block_size, 64)
        n_nested = weight.nested.shape[1] // 4 - 1
        if backward:
            columns = k // run
            lora = self.lora_a
            out = self.new_zeros(x, k)
        else:
            columns = -(-n // self.tile["N"])
            lora = self.lora_b
            out = self.new_zeros(x, n)
        tables = tables_of_levels(weight.quant_type, self.device)
        factors = w_factor, lora.factor, x.factor, h.factor
        tensors = *weight[:3], *tables, lora.values, self.ends, x.values, h.values, out, *factors
        self._run(
            _product_kernel, (self.tiles, columns, 1), (n_nested, self.experts, n, k, self.r), tensors, backward,
            1.0 if backward else self.scaling, BACKWARD=backward, BLOCK_SIZE=weight.block_size,
            DOUBLE_QUANT=n_nested >= 0, EXPERTS=triton.next_power_of_2(self.experts), RUN=run,
        )  # fmt: skip
        return out

    def project(self, x: Half, backward: bool) -> Tensor:
        """drop(x) A^T, or backward s x B: [rows, r]."""
        k = x.shape[1]
        out = self.new_zeros(x, self.r)
        lora = self.lora_b if backward else self.lora_a
        strides = (1, self.r) if backward else (k, 1)
        self._run(
            _project_kernel, (self.tiles, -(-self.r // self.rank), 1), (self.experts, k, self.r, *strides),
            (lora.values, self.ends, x.values, out, lora.factor, x.factor), not backward,
            self.scaling if backward else 1.0, BACKWARD=backward, EXPERTS=triton.next_power_of_2(self.experts),
        )  # fmt: skip
        return out

    def gradients(self, h: Half, x: Half, of_b: bool) -> Tensor:
        """h^T drop(x) of every expert: [experts, r, in]; of B its transpose, s x^T h: [experts, out, r]."""
        n = x.shape[1]
        shape = (self.experts, n, self.r) if of_b else (self.experts, self.r, n)
        strides = (1, self.r) if of_b else (n, 1)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._run(
            _gradients_kernel, (-(-n // self.tile["N"]), -(-self.r // self.rank), self.experts), (n, self.r, *strides),
            (self.ends, h.values, x.values, out, h.factor, x.factor), not of_b, self.scaling if of_b else 1.0,
        )  # fmt: skip
        return out

    def _run(
        self, kernel: Any, grid: tuple[int, int, int], numbers: tuple[int, ...], tensors: tuple[Tensor, ...],
        drops: bool, s: float, **constants: Any,
    ) -> None:  # fmt: skip
        dropout = drops and self.has_dropout
        *mask, scale = self.dropout if dropout else NO_DROPOUT
        constants |= {"DROPOUT": dropout, "HALF": self.half, "R": self.rank}
        types = tuple([tensor.dtype for tensor in tensors])
        launch_of(types, kernel, self.device, grid, numbers, self.tile, **constants)(tensors, (*mask, s * scale))


def grouped_linear(x: Tensor | Half, ends: Tensor, weight: PackedBytes, lora: LoRA) -> tuple[Tensor, Tensor]:
    group = Group(x.shape[0], ends, weight, lora, isinstance(x, Half))
    of_x = group.factor(x)
    if not x.shape[0]:
        return group.new_zeros(of_x, weight.shape[1]), group.new_zeros(of_x, group.r)
    xa = group.project(of_x, backward=False)
    return group.product(of_x, group.factor(xa), backward=False), xa


def grouped_linear_backward(
    grad: Tensor | Half, x: Tensor | Half, xa: Tensor, ends: Tensor, weight: PackedBytes, lora: LoRA
) -> tuple[Tensor, Tensor, Tensor]:
    group = Group(x.shape[0], ends, weight, lora, isinstance(x, Half))
    of_x = group.factor(x)
    of_grad = group.factor(grad)
    if not x.shape[0]:
        return group.new_zeros(of_x, x.shape[1]), torch.zeros_like(lora.a), torch.zeros_like(lora.b)
    grad_xa = group.factor(group.project(of_grad, backward=True))
    grad_a = group.gradients(grad_xa, of_x, of_b=False)
    grad_b = group.gradients(group.factor(xa), of_grad, of_b=True)
    return group.product(of_grad, grad_xa, backward=True), grad_a, grad_b
