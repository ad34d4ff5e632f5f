"""One product of a layer at a time, for benchmarks and tests; `kernels/triton/linear.py` runs them together."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.kernels.half import Half
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.triton import linear, lora_products
from lightning_qlora.kernels.triton.dropout import dropout_arguments, dropout_into
from lightning_qlora.kernels.triton.launch import Launch, Tile, find_tile
from lightning_qlora.kernels.triton.matmul import matmul
from lightning_qlora.kernels.triton.quantize import tables_of_levels, weight_arguments
from lightning_qlora.kernels.triton.vector import vector
from lightning_qlora.quantization.packed_weight import PackedBytes


def lora_down(
    x: Tensor, w: Tensor, s: float = 1.0, p: float = 0.0, seed: Tensor | None = None, cast: Tensor | None = None
) -> Tensor:
    """s drop(x) w^T: x [m, k] and w [r, k] of any strides -> [m, r]; x in fp32 is cast, to `cast`."""
    if cast is None and not find_tile("lora_down", x.device, x.shape[0]):
        plan = _plan(x, w, p, seed)
        return plan.product(plan.dropped(x, seed), w.T, s)
    cast = x if cast is None else cast
    out = cast.new_empty(x.shape[0], w.shape[0])
    run = _launch("lora_down", (x, w, out), (*x.shape, w.shape[0], w.stride()), seed)
    run((x, w, out, run.memory(out), cast), _numbers(s, p, seed, x.device))
    return out


def lora_up(h: Tensor, w: Tensor, out: Tensor, s: float = 1.0, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Write s h w^T, or its dropout, to `out`: h [m, r], w [n, r]."""
    if not find_tile("lora_up", out.device, out.shape[0]):
        _plan(h, w.T, p, seed).product(h, w.T, s, out)
        return out if seed is None else dropout_into(out, out, p, seed)
    run = _launch("lora_up", (h, w), (*out.shape, w.shape[1], w.stride()), seed)
    run((h, w, out), _numbers(s, p, seed, out.device))
    return out


def finish(sums: Tensor, h: Tensor, w: Tensor, p: float, seed: Tensor | None) -> None:
    """Sums times two powers of two (h in fp32), plus the dropout of h w^T: sums [m, n], h [m, r], w [n, r]."""
    sizes = *sums.shape, w.shape[1], w.stride(), seed is not None, False
    run = lora_products.finish((w.dtype, sums.dtype, h.dtype), sums.device, *sizes)
    power = torch.ones(1, device=sums.device)
    run((h, w, sums, power.expand(len(sums)).contiguous(), power, sums), _numbers(1.0, p, seed, sums.device))


def lora_gradients(
    grad_xa: Tensor, x: Tensor, grad_a: Tensor, xa: Tensor, grad: Tensor, grad_b: Tensor, s: float, p: float = 0.0,
    seed: Tensor | None = None,
) -> None:  # fmt: skip
    """Write grad_xa^T drop(x) to `grad_a` [r, k] and s grad^T xa to `grad_b` [n, r], of any strides."""
    if not find_tile("lora_gradients", x.device, x.shape[0]):
        plan = _plan(x, grad_a, p, seed)
        grad_a.copy_(plan.product(grad_xa.T, plan.dropped(x, seed)))
        grad_b.copy_(plan.product(grad.T, xa, s))
        return
    sizes = *x.shape, *grad_b.shape, (*grad_a.stride(), *grad_b.stride())
    run = _launch("lora_gradients", (x, grad_a, grad_b, grad_xa), sizes, seed)
    tensors = grad_xa, x, grad_a, xa, grad, grad_b, run.memory(xa)
    run(tensors, (*_numbers(1.0, p, seed, x.device), float(s)))


def add_matmul_(y: Tensor, x: Any, weight: PackedBytes, bias: Tensor | None = None) -> Tensor:
    """y += x W^T + bias, with W decoded inside; returns y."""
    values, power = (x.values, x.factor) if isinstance(x, Half) else (x, x)
    tensors = *weight_arguments(weight)[0], *tables_of_levels(weight.quant_type, y.device)
    m = x.shape[0]
    if values.dtype is torch.float32:
        run = vector(m, weight, bias is not None)
    else:
        types = values.dtype, (y if bias is None else bias).dtype, y.dtype
        run = matmul(m, weight, bias is not None, isinstance(x, Half), types)
    run((*tensors, values, y if bias is None else bias, y, run.memory(y), power if isinstance(x, Half) else y))
    return y


def _plan(x: Tensor, a: Tensor, p: float, seed: Tensor | None) -> linear.Plan:
    """Without a tile the products are torch's."""
    return linear.plan(x, LoRA(a, a.T, 1.0, p, seed))


def _launch(name: str, tensors: tuple[Tensor, ...], sizes: Any, seed: Tensor | None) -> Launch:
    tile = find_tile(name, tensors[0].device, sizes[0])
    types = tuple(tensor.dtype for tensor in tensors)
    arguments = tensors[0].device, *sizes, seed is not None
    if name != "lora_up":
        arguments = *arguments, types
    return _kept(tile, types, getattr(lora_products, name), *arguments)


@lru_cache
def _kept(_tile: Tile, _types: Any, function: Callable[..., Launch], *arguments: Any) -> Launch:
    """As a plan keeps it: the second call takes the short path."""
    return function(*arguments)


def _numbers(s: float, p: float, seed: Tensor | None, device: torch.device) -> tuple[int, int, int, float]:
    low, high, least_kept, scale = dropout_arguments(p, seed, device)
    return low, high, least_kept, s * scale
