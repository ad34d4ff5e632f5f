"""The 4-bit layer with its adapter, y = x W^T + bias + s (drop(x) A^T) B^T, and its gradients.

The order of the products is that of `eager.py`. W is decoded into one reused buffer per stream, and cuBLAS or hipBLASLt
multiplies. For few rows of x, as in generation, W is decoded inside the product (`matmul.py`, `vector.py`), which reads
it as 4 bits, never writes it, and adds the bias. `tiles.json` says for how many rows.

Launches: 4 forward (few rows: 3; many rows with a bias: 5), 5 backward, with or without dropout. The adapter in fp32
needs no 16-bit copies. Of x in fp32 that products take in 16 bits, and of dY, the first product writes a cast; y and dX
are sums in fp32, to which the last launch adds the adapter's part and the bias.
"""

from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.kernels import eager
from lightning_qlora.kernels.half import Half, Wide, multiply, scaled_weight
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.scratch import lend
from lightning_qlora.kernels.triton.dropout import dropout_arguments, dropout_into
from lightning_qlora.kernels.triton.half import rows_to_half, scaled, take_out_
from lightning_qlora.kernels.triton.launch import Launch, find_tile
from lightning_qlora.kernels.triton.lora_products import MAX_GRID, finish, lora_down, lora_gradients, lora_up
from lightning_qlora.kernels.triton.matmul import matmul
from lightning_qlora.kernels.triton.quantize import dequantize_into, tables_of_levels, weight_arguments
from lightning_qlora.kernels.triton.vector import vector
from lightning_qlora.quantization.packed_weight import PackedBytes, aligned


def plan(x: Tensor | Half, lora: LoRA, weight: PackedBytes | None = None, types: eager.Types | None = None) -> "Plan":
    if types is not None:
        fused = Plan(x, lora, weight, types)
        return fused if fused.casts_inside else Casting(x, lora, weight, types)
    if lora.in_fp16 and isinstance(x, Tensor):
        in_fp32 = Plan(x, lora, weight)
        if in_fp32.few_rows:  # read as 4 bits, W takes less time than to fp16 and tensor cores
            return in_fp32
    return HalfPlan(x, lora, weight) if lora.in_fp16 else Plan(x, lora, weight)


class Plan(eager.Plan):
    """The layer with a launch for each product, made at its first use; without tiles the products are torch's.

    Kernels read by address, so their matrices are contiguous.
    """

    def __init__(
        self, x: Tensor | Half, lora: LoRA, weight: PackedBytes | None = None, types: eager.Types | None = None
    ) -> None:
        super().__init__(x, lora, weight, types)
        self.library = None
        self.in_one_call = False
        self.dropout_into = dropout_into
        self.dequantize_into = partial(dequantize_into, tile=find_tile("dequantize", self.device))
        self.drops = lora.seed is not None
        self.adapter_types = lora.a.dtype, lora.b.dtype
        tiles = [find_tile(name, self.device, self.m) for name in ("lora_down", "lora_up", "lora_gradients")]
        in_16_bits = self.dtype is not torch.float32
        has_sums = self.m > 0 and self.r > 0
        self.has_kernels = in_16_bits and has_sums and all(tiles) and self.m <= MAX_GRID * tiles[1]["M"]
        self.x_dtype = x.dtype
        self.casts_inside = types is not None and self.has_kernels
        # By tensor cores, or by the kernel that needs none, whose factors are fp32.
        self.matmul = "matmul" if in_16_bits or self.in_fp16 else "vector"
        self.few_rows = False  # whether W is decoded inside of the product
        if weight is not None and self.m and self.k % min(weight.block_size, 64) == 0:
            self.few_rows = bool(find_tile(self.matmul, self.device, self.m))
        self.of_weight: Launch | None = None  # x W^T
        self.finishes: dict[Any, Launch] = {}  # of `sum_into`

    @cached_property
    def of_x(self) -> Launch:
        """x A^T."""
        types = self.x_dtype, self.adapter_types[0], self.dtype
        return lora_down(self.device, self.m, self.k, self.r, (self.k, 1), self.drops, types)

    @cached_property
    def of_xa(self) -> Launch:
        """(x A^T) B^T."""
        return lora_up(self.device, self.m, self.n, self.r, (self.r, 1), False)

    @cached_property
    def of_grad(self) -> Launch:
        """dY B."""
        types = self.y_dtype, self.adapter_types[1], self.dtype
        return lora_down(self.device, self.m, self.n, self.r, (1, self.r), False, types)

    @cached_property
    def of_grad_xa(self) -> Launch:
        """(dY B) A."""
        return lora_up(self.device, self.m, self.k, self.r, (1, self.k), self.drops)

    @cached_property
    def of_adapter(self) -> Launch:
        """The gradients of A and B."""
        strides = self.k, 1, self.r, 1
        types = self.x_dtype, *self.adapter_types, self.dtype
        return lora_gradients(self.device, self.m, self.k, self.n, self.r, strides, self.drops, types)

    def with_cast(self, x: Any) -> tuple[Tensor, Tensor]:
        """x or dY, and what is multiplied: the same, or its cast, which is not written yet."""
        if isinstance(x, Wide):
            return x
        x = x.contiguous()
        return x, x

    def lora_project(self, x: Any, lora: LoRA) -> Tensor:
        if not self.has_kernels:
            return super().lora_project(x, lora)
        x, cast = self.with_cast(x)
        a = lora.a.contiguous()
        xa = cast.new_empty(self.m, self.r)
        launch = self.of_x
        memory = launch.memory(xa) if launch.sums else xa
        run = launch if (x.data_ptr() | a.data_ptr()) & 15 else launch.aligned
        run((x, a, xa, memory, cast), dropout_arguments(self.p, lora.seed, self.device))
        return xa

    def linear_into(self, out: Tensor, x: Any, xa: Any, weight: PackedBytes, bias: Tensor | None, lora: LoRA) -> None:
        if self.casts_inside:
            x = x.cast
            if out.dtype is torch.float32 and not self.few_rows:
                self.sum_into(out, x, weight, True, xa, lora.b, bias, None, lora.scaling)
                return
        if self.has_kernels:
            b = lora.b.contiguous()
            run = self.of_xa if (xa.data_ptr() | b.data_ptr() | out.data_ptr()) & 15 else self.of_xa.aligned
            run((xa, b, out), (0, 0, 0, float(lora.scaling)))
        else:
            self.product(xa, lora.b.T, lora.scaling, out)
        if self.few_rows:
            self.add_matmul_(out, x, out, weight, bias)
            return
        self.add_product(out, x, weight, transposed=True)
        if bias is not None:
            out.add_(bias)

    def linear_backward(
        self, grad: Any, x: Any, xa: Any, weight: PackedBytes, lora: LoRA, needs_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        if not self.has_kernels:
            return super().linear_backward(grad, x, xa, weight, lora, needs_x)
        of_grad, cast = self.with_cast(grad)
        of_x = x.contiguous()
        xa = xa.contiguous()
        a = lora.a.contiguous()
        b = lora.b.contiguous()
        numbers = dropout_arguments(self.p, lora.seed, self.device)
        s = float(lora.scaling)  # Triton would compile another kernel for an int
        grad_xa = xa.new_empty(self.m, self.r)
        places = of_grad.data_ptr() | of_x.data_ptr() | xa.data_ptr() | a.data_ptr() | b.data_ptr()
        launches = self.of_grad, self.of_adapter
        down, gradients = launches if places & 15 else [launch.aligned for launch in launches]
        memory = self.of_grad.memory(grad_xa) if self.of_grad.sums else grad_xa
        down((of_grad, b, grad_xa, memory, cast), (0, 0, 0, s))
        grad_a = a.new_empty(self.r, self.k)
        grad_b = b.new_empty(self.n, self.r)
        memory = self.of_adapter.memory(xa) if self.of_adapter.sums else xa
        gradients((grad_xa, of_x, grad_a, xa, cast, grad_b, memory), (*numbers, s))
        if not needs_x:
            return None, grad_a, grad_b
        grad_x = of_x.new_empty(self.m, self.k)
        if self.casts_inside:
            self.sum_into(grad_x, cast, weight, False, grad_xa, lora.a.T, None, lora.seed)
            return grad_x, grad_a, grad_b
        up = self.of_grad_xa if places & 15 else self.of_grad_xa.aligned
        up((grad_xa, a, grad_x), numbers)
        self.add_product(grad_x, grad, weight, transposed=False)
        return grad_x, grad_a, grad_b

    def add_matmul_(self, y: Tensor, x: Tensor, power: Tensor, weight: PackedBytes, bias: Tensor | None) -> None:
        """y += x W^T + bias, rounded once; of `half` x W^T times the powers of rows, which are not read else."""
        addend = y
        if bias is not None:
            addend = bias.contiguous()
        if self.matmul == "vector":  # it reads eight codes at a time
            weight = weight._replace(packed=aligned(weight.packed))
        bytes, is_aligned = weight_arguments(weight)
        tensors = *bytes, *tables_of_levels(weight.quant_type, self.device)
        if self.of_weight is None:
            if self.matmul == "vector":
                self.of_weight = vector(self.m, weight, bias is not None)
            else:
                types = x.dtype, addend.dtype, y.dtype
                self.of_weight = matmul(self.m, weight, bias is not None, self.in_fp16, types)
        x = x.contiguous()
        launch = self.of_weight
        is_aligned = is_aligned and not (x.data_ptr() | addend.data_ptr() | y.data_ptr()) & 15
        run = launch.aligned if is_aligned else launch
        run((*tensors, x, addend, y, launch.memory(y), power))

    def sum_into(
        self, out: Tensor, x: Tensor | Half, weight: PackedBytes, transposed: bool, h: Tensor, w: Tensor,
        bias: Tensor | None, seed: Tensor | None, s: float = 1.0,
    ) -> None:  # fmt: skip
        """out = x W^T, or x W, in fp32, + s drop(h w^T) + bias."""
        powers = out, out
        if isinstance(x, Half):
            weight, power = scaled_weight(weight, scaled)
            powers = x.factor, power
            x = x.values
        with lend((self.n, self.k), self.decoded_dtype, self.device) as buffer:
            self.dequantize_into(buffer.matrix, weight)
            multiply(x, buffer.transposed if transposed else buffer.matrix, out)
        if not out.numel():
            return
        *mask, scale = dropout_arguments(self.p, seed, self.device)
        added = out if bias is None else bias.contiguous()
        variant = transposed, w.stride(), seed is not None, bias is not None
        run = self.finishes.get(variant)
        if run is None:
            types = w.dtype, added.dtype, h.dtype
            sizes = *out.shape, self.r, *variant[1:]
            run = self.finishes[variant] = finish(types, self.device, *sizes)
        run((h.contiguous(), w, added, *powers, out), (*mask, scale * s))


class Casting(eager.Casting, Plan):
    """For no rows, no ranks, and cards without tiles for the products."""


class HalfPlan(Plan, eager.HalfPlan):
    """The same with factors of fp16 and their powers of two: torch multiplies, and one launch does what is left.

    The cards that need it have tensor cores that Triton does not use (Turing, Volta).
    """

    rows_to_half = staticmethod(rows_to_half)
    scaled = staticmethod(scaled)  # type: ignore[assignment]
    take_out = staticmethod(take_out_)

    def rows(self, x: Tensor | Half, seed: Tensor | None = None) -> Half:
        return x if isinstance(x, Half) else self.rows_to_half(x.reshape(-1, x.shape[-1]), None, self.p, seed)

    def linear_into(self, out: Tensor, x: Half, xa: Any, weight: PackedBytes, bias: Tensor | None, lora: LoRA) -> None:
        if self.few_rows:
            self.product(xa, lora.b.T, lora.scaling, out)
            self.add_matmul_(out, x.values, x.factor, weight, bias)
            return
        self.sum_into(out, x, weight, True, xa, lora.b, bias, None, lora.scaling)

    def input_gradient(self, grad: Half, grad_xa: Any, weight: PackedBytes, lora: LoRA) -> Tensor:
        out = grad.factor.new_empty(self.m, self.k)
        self.sum_into(out, grad, weight, False, grad_xa, lora.a.T, None, lora.seed)
        return out
