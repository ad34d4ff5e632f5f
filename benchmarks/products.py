"""One product of a layer at a time, for benchmarks and tests; `kernels/triton/linear.py` runs them together."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.kernels.half import Half, multiply
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.triton import linear, lora_products
from lightning_qlora.kernels.triton.dropout import dropout_arguments, dropout_into
from lightning_qlora.kernels.triton.launch import Launch, Tile, find_tile
from lightning_qlora.kernels.triton.quantize import tables_of_levels, weight_arguments
from lightning_qlora.quantization.packed_weight import PackedBytes


def lora_down(x: Any, w: Any, s: float = 1.0, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """s drop(x) w^T: x [m, k] and w [r, k] of any strides -> [m, r]."""
    if not find_tile("lora_down", x.device, x.shape[0]):
        plan = _plan(x, w, p, seed)
        return plan.product(plan.dropped(x, seed), w.T, s)
    (values, x_power), (matrix, w_power) = _pair(x), _pair(w)
    out = x_power.new_empty(x.shape[0], w.shape[0])
    sizes = *x.shape, w.shape[0], matrix.stride()
    run = _launch("lora_down", (values, matrix), sizes, seed is not None, isinstance(x, Half))
    powers = (x_power, w_power) if isinstance(x, Half) else ()
    run((values, matrix, out, run.memory(out), *powers), _numbers(s, p, seed, x.device))
    return out


def lora_up(
    h: Any, w: Any, out: Tensor, s: float = 1.0, p: float = 0.0, seed: Tensor | None = None, factors: Any = None
) -> Tensor:
    """Write s h w^T, or its dropout, to `out`, or add it to out times two `factors`: h [m, r], w [n, r]."""
    (values, h_power), (matrix, w_power) = _pair(h), _pair(w)
    powers = h_power, w_power, *(factors or (out, out))
    numbers = _numbers(s, p, seed, out.device)
    adds = factors is not None
    if not find_tile("lora_up_add" if adds else "lora_up", out.device, out.shape[0]):
        if isinstance(h, Half):
            run = lora_products.lora_combine(out.device, out.numel(), seed is not None, adds)
            run((multiply(values, matrix.T), out, *powers), numbers)
            return out
        _plan(h, w.T, p, seed).product(h, w.T, s, out)
        return out if seed is None else dropout_into(out, out, p, seed)
    sizes = *out.shape, w.shape[1], matrix.stride()
    run = _launch("lora_up", (values, matrix), sizes, seed is not None, isinstance(h, Half), adds)
    run((values, matrix, out, *(powers if isinstance(h, Half) else ())), numbers)
    return out


def lora_gradients(
    grad_xa: Any, x: Any, grad_a: Tensor, xa: Any, grad: Any, grad_b: Tensor, s: float, p: float = 0.0,
    seed: Tensor | None = None,
) -> None:  # fmt: skip
    """Write grad_xa^T drop(x) to `grad_a` [r, k] and s grad^T xa to `grad_b` [n, r], of any strides."""
    if not find_tile("lora_gradients", x.device, x.shape[0]):
        plan = _plan(x, grad_a, p, seed)
        grad_a.copy_(plan.product(grad_xa.T, plan.dropped(x, seed)))
        grad_b.copy_(plan.product(grad.T, xa, s))
        return
    (of_grad_xa, of_x, of_xa, of_grad), powers = zip(*map(_pair, (grad_xa, x, xa, grad)), strict=True)
    sizes = *x.shape, *grad_b.shape, (*grad_a.stride(), *grad_b.stride())
    run = _launch("lora_gradients", (of_x, grad_a, grad_b), sizes, seed is not None, isinstance(x, Half))
    tensors = of_grad_xa, of_x, grad_a, of_xa, of_grad, grad_b, run.memory(of_xa)
    run((*tensors, *(powers if isinstance(x, Half) else ())), (*_numbers(1.0, p, seed, x.device), float(s)))


def add_matmul_(y: Tensor, x: Any, weight: PackedBytes, bias: Tensor | None = None) -> Tensor:
    """y += x W^T + bias, with W decoded inside; returns y."""
    values, *power = x if isinstance(x, Half) else (x,)
    tensors = *weight_arguments(weight)[0], *tables_of_levels(weight.quant_type, y.device)
    run = linear.matmul(x.shape[0], weight, bias is not None, isinstance(x, Half))
    run((*tensors, values, y if bias is None else bias, y, run.memory(y), *power))
    return y


def _plan(x: Any, a: Any, p: float, seed: Tensor | None) -> linear.Plan:
    """Without a tile the products are torch's."""
    return linear.plan(x, LoRA(a, a.T, 1.0, p, seed, isinstance(x, Half)))


def _launch(name: str, tensors: tuple[Tensor, ...], sizes: Any, *choices: bool) -> Launch:
    tile = find_tile("lora_up_add" if name == "lora_up" and choices[-1] else name, tensors[0].device, sizes[0])
    types = tuple(tensor.dtype for tensor in tensors)
    return _kept(tile, types, getattr(lora_products, name), tensors[0].device, *sizes, *choices)


@lru_cache
def _kept(_tile: Tile, _types: Any, function: Callable[..., Launch], *arguments: Any) -> Launch:
    """As a plan keeps it: the second call takes the short path."""
    return function(*arguments)


def _pair(x: Any) -> tuple[Tensor, Tensor]:
    """What a kernel gets of a matrix: its values, and a power of two, which it reads of a `Half` alone."""
    return x if isinstance(x, Half) else (x, x)


def _numbers(s: float, p: float, seed: Tensor | None, device: torch.device) -> tuple[int, int, int, float]:
    mask, scale = dropout_arguments(p, seed, device)
    return *mask, s * scale
