"""The backend of CPUs, and of other devices without Triton: the C kernels of `cpu/` where they exist, else plain torch.

The results are those of `reference.py`. The weight is decoded into a reused buffer, or inside the product for few rows
of input (C kernels only). The adapter's product is written first and the large one added to it (beta = 1), which sums
in fp32 and rounds once, as `reference.py` demands. The bias comes last.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels import reference
from lightning_qlora.kernels.cpu.library import OFF, Library, compiled_library, is_off
from lightning_qlora.kernels.half import Half, Wide, multiply, scaled, scaled_weight
from lightning_qlora.kernels.half import take_out as take_out
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.reference import dropout_kept, dropout_threshold
from lightning_qlora.kernels.reference import grouped_linear as grouped_linear
from lightning_qlora.kernels.reference import grouped_linear_backward as grouped_linear_backward
from lightning_qlora.kernels.reference import rows_to_half as rows_to_half
from lightning_qlora.kernels.scratch import lend, scratch
from lightning_qlora.quantization.blockwise import CHUNK
from lightning_qlora.quantization.packed_weight import PackedBytes


def path() -> str:
    """How the CPU computes, as a text for users."""
    library = compiled_library()
    if library is not None:
        return f"C kernels, {library.form}"
    if is_off():
        return f"plain torch ({OFF} is set)"
    return "plain torch (the C kernels could not be compiled)"


def _library(device: torch.device, dtype: torch.dtype) -> Library | None:
    if device.type != "cpu":
        return None
    library = compiled_library()
    if library is None or dtype not in library.types:
        return None
    return library


def quantize(weight: Tensor, quant_type: QuantType, block_size: int, double_quant: bool) -> PackedBytes:
    library = _library(weight.device, weight.dtype)
    if library is None:
        return reference.quantize(weight, quant_type, block_size, double_quant)
    return library.quantize(weight, quant_type, block_size, double_quant)


def dequantize(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    return dequantize_into(weight.packed.new_empty(weight.shape, dtype=dtype), weight)


def dequantize_into(out: Tensor, weight: PackedBytes) -> Tensor:
    library = _library(out.device, out.dtype)
    if library is None:
        weight.dequantize_into(out.view(-1))
        return out
    return library.dequantize_into(out, weight)


Types = tuple[torch.dtype, torch.dtype]


def plan(x: Tensor | Half, lora: LoRA, weight: PackedBytes | None = None, types: Types | None = None) -> "Plan":
    """`types`: the 16-bit type in which products take x in fp32, and the type of y; None: those of x."""
    if types is not None:
        return Casting(x, lora, weight, types)
    return HalfPlan(x, lora) if lora.in_fp16 else Plan(x, lora)


class Plan:
    """The three functions of a layer for inputs of one shape and type, with what is the same in all their calls.

    `reference` says what they compute. A plan depends on shapes, types and devices alone, and holds no tensor.
    """

    in_fp16 = False  # whether the factors of products are those of `half.Half`

    def __init__(
        self, x: Tensor | Half, lora: LoRA, weight: PackedBytes | None = None, types: Types | None = None
    ) -> None:
        a, b, *_ = lora
        self.types = types
        self.dtype, self.y_dtype = types or (x.dtype, x.dtype)  # of what products take, and of y
        lead = x.shape[:-1]
        self.m = lead.numel()
        self.r, self.k = a.shape
        self.n = b.shape[0]
        self.is_matrix = len(lead) == 1
        # x and dY as they are; else what `rows` makes of them.
        self.takes_x = self.is_matrix and not self.in_fp16 and types is None
        self.shape = *lead, self.n  # of y
        of_xa = torch.Size((self.m, self.r)), self.dtype
        of_x = torch.Size((self.m, self.k)) if self.in_fp16 else x.shape, x.dtype  # of what the backward pass gets
        self.operands = *of_x, *of_xa, a.shape, a.dtype, a.device, b.shape, b.dtype, b.device
        self.device = x.device
        self.kind = x.device.type
        self.decoded_dtype = torch.float16 if self.in_fp16 else self.dtype
        self.p = lora.p
        library = _library(self.device, self.dtype)
        decoder = _library(self.device, self.decoded_dtype)
        self.library: Any = library
        self.dropout_into = dropout_in_chunks if library is None else library.dropout_into
        self.dequantize_into = dequantize_into if decoder is None else decoder.dequantize_into
        # Whether C has the layer in one call, which decodes W inside of the product.
        self.in_one_call = library is not None and library.is_fast_for(self.m, self.dtype) and not self.in_fp16

    def replace(self, **functions: Any) -> None:
        self.__dict__.update(functions)

    def matrix(self, x: Tensor) -> Tensor:
        """x [..., in], y or dY as a matrix; they are one if `is_matrix`."""
        return x if self.is_matrix else x.reshape(self.m, x.shape[-1])

    def rows(self, x: Tensor, seed: Tensor | None = None) -> Any:
        """x, or dY, as the three functions take it; x with the seed of its dropout."""
        x = self.matrix(x)
        if x.dtype is self.dtype:
            return x
        return Wide(x.contiguous(), torch.empty(x.shape, dtype=self.dtype, device=x.device))

    def lora_project(self, x: Any, lora: LoRA) -> Tensor:
        return self.product(self.dropped(x, lora.seed), lora.a.T)

    def linear_into(
        self, out: Tensor, x: Any, xa: Tensor | None, weight: PackedBytes, bias: Tensor | None, lora: LoRA
    ) -> None:
        """`xa`: None is x A^T without dropout, if `in_one_call`."""
        if self.in_one_call:
            self.library.lora_linear(out, x, weight, bias, lora, xa)
            return
        self.product(xa, lora.b.T, lora.scaling, out)
        self.add_product(out, x, weight, transposed=True)
        if bias is not None:
            out.add_(bias)

    def linear_backward(
        self, grad: Any, x: Any, xa: Tensor, weight: PackedBytes, lora: LoRA, needs_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        grad_xa = self.product(grad, lora.b, lora.scaling)
        grad_b = self.product(grad.T, xa, lora.scaling).to(lora.b.dtype)
        grad_a = self.product(grad_xa.T, self.dropped(x, lora.seed)).to(lora.a.dtype)
        grad_x = self.input_gradient(grad, grad_xa, weight, lora) if needs_x else None
        return grad_x, grad_a, grad_b

    def input_gradient(self, grad: Any, grad_xa: Any, weight: PackedBytes, lora: LoRA) -> Tensor:
        """dY W + drop(dXA A)."""
        grad_x = self.product(grad_xa, lora.a)
        if lora.seed is not None:
            self.dropout_into(grad_x, grad_x, self.p, lora.seed)
        self.add_product(grad_x, grad, weight, transposed=False)
        return grad_x

    def gradients(
        self, grad: Tensor, x: Tensor, xa: Tensor, weight: PackedBytes, lora: LoRA, needs_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Those of x (shaped like x; None if it is not needed), A and B, without the autocast of the caller."""
        if torch.is_autocast_enabled(self.kind):
            with torch.autocast(self.kind, enabled=False):
                return self.gradients(grad, x, xa, weight, lora, needs_x)
        if self.takes_x:
            return self.linear_backward(grad, x, xa, weight, lora, needs_x)
        rows = self.rows(x, lora.seed) if self.types is None else self.matrix(x)
        grad_x, grad_a, grad_b = self.linear_backward(self.rows(grad), rows, xa, weight, lora, needs_x)
        if grad_x is not None:
            grad_x = grad_x.view(*grad.shape[:-1], self.k)
        return grad_x, grad_a, grad_b

    def product(self, a: Any, b: Any, s: float = 1.0, out: Tensor | None = None, adds: bool = False) -> Tensor:
        """s a b, b rounded as a is: a [m, k], b [k, n]. It is written to `out`, or added to it, and rounded once."""
        if b.dtype is not a.dtype:
            b = b.to(a.dtype)
        if s == 1.0 and not adds:
            return torch.mm(a, b, out=out)
        if out is None:
            out = a.new_empty(a.shape[0], b.shape[1])
        return out.addmm_(a, b, beta=1 if adds else 0, alpha=s)

    def add_product(
        self, out: Tensor, x: Any, weight: PackedBytes, transposed: bool, power: Tensor | None = None
    ) -> None:
        """out += x W^T, or x W, rounded once; `power`: what the scales of W were divided by (`scaled_weight`)."""
        with lend((self.n, self.k), self.decoded_dtype, self.device) as buffer:
            self.dequantize_into(buffer.matrix, weight)
            matrix: Any = buffer.transposed if transposed else buffer.matrix
            if power is not None:
                matrix = Half(matrix, power)
            self.product(x, matrix, out=out, adds=True)

    def dropped(self, x: Any, seed: Tensor | None) -> Any:
        """drop(x) in a reused buffer, valid until the next call; x itself without a seed."""
        if seed is None:
            return x
        out = scratch((self.m, self.k), self.dtype, self.device, "dropped")
        return self.dropout_into(out, x.contiguous(), self.p, seed)


class Casting(Plan):
    """The same for x in fp32, and such y and dY, by products of their casts."""

    def lora_project(self, x: Wide, lora: LoRA) -> Tensor:
        return super().lora_project(x.cast.copy_(x.values), lora)

    def linear_into(self, out: Tensor, x: Wide, xa: Any, weight: PackedBytes, bias: Tensor | None, lora: LoRA) -> None:
        y = torch.empty(out.shape, dtype=self.dtype, device=out.device)
        super().linear_into(y, x.cast, xa, weight, bias, lora)
        out.copy_(y)

    def linear_backward(
        self, grad: Any, x: Tensor, xa: Tensor, weight: PackedBytes, lora: LoRA, needs_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        if isinstance(grad, Wide):
            grad = grad.cast.copy_(grad.values)
        grad_x, grad_a, grad_b = super().linear_backward(grad, x.to(self.dtype), xa, weight, lora, needs_x)
        return None if grad_x is None else grad_x.float(), grad_a, grad_b


class HalfPlan(Plan):
    """The same with factors of fp16 and powers of two for their rows (`half.py`); x, y and all results are fp32.

    The adapter's second product, (x A^T) B^T or (dY B) A, stays in fp32: it takes little time.
    """

    in_fp16 = True
    rows_to_half = staticmethod(rows_to_half)
    scaled = staticmethod(scaled)
    take_out = staticmethod(take_out)

    def rows(self, x: Tensor | Half, seed: Tensor | None = None) -> Half:
        return x if isinstance(x, Half) else self.rows_to_half(x.reshape(-1, x.shape[-1]))

    def product(self, a: Any, b: Any, s: float = 1.0, out: Tensor | None = None, adds: bool = False) -> Tensor:
        """A sum over rows that have a power each: the other factor is multiplied by them before it is cast."""
        if isinstance(a, Half):
            rows: Tensor | None = a.factor
            times = None
            if a.factor.shape == (1, a.shape[1]):
                rows = None
                times = a.factor
            if not isinstance(b, Half):
                b = self.rows_to_half(b.mT, times).T
            columns = b.factor
        elif isinstance(b, Half):
            a = self.rows_to_half(a, b.factor)
            rows = a.factor
            columns = None
        else:
            return super().product(a, b, s, out, adds)
        sums = multiply(a.values, b.values, None if adds else out)
        result = self.take_out(sums, rows, columns, s)
        return out.add_(result) if adds and out is not None else result

    def add_product(
        self, out: Tensor, x: Any, weight: PackedBytes, transposed: bool, power: Tensor | None = None
    ) -> None:
        weight, power = scaled_weight(weight, self.scaled)
        super().add_product(out, x, weight, transposed, power)

    def dropped(self, x: Half, seed: Tensor | None) -> Any:
        if seed is None:
            return x
        if x.dropped is not None:
            return x.dropped
        values = x.to_fp32().contiguous()  # cast again: x / (1 - p) can pass the end of fp16
        return self.rows_to_half(self.dropout_into(values, values, self.p, seed))


def dropout_in_chunks(out: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
    """See `reference.dropout`; `out` may be `x`, both contiguous."""
    source = x.view(-1)
    flat = out.view(-1)
    _, factor = dropout_threshold(p)
    for start in range(0, flat.numel(), CHUNK):
        stop = min(start + CHUNK, flat.numel())
        keep = dropout_kept(start, stop, p, seed, x.device)
        flat[start:stop] = torch.where(keep, source[start:stop] * factor, 0)
    return out


def can_group(*_: object) -> bool:
    """A CPU computes expert by expert: it knows without waiting how many rows each of them has."""
    return False
