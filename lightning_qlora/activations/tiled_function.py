"""A function of rows, computed in tiles of rows: its graph keeps the input alone.

    forward     y[tile] = f(x[tile])                                    without a graph
    backward    dx[tile], dw += gradients of f(x[tile]) for dy[tile]    each tile again, with a graph of its own

The node of the graph is made on the empty output, before the values are computed: when activation checkpointing
recomputes a block, torch stops as soon as the last tensor is saved, so the last function of a block is computed twice
and not three times. Dropout draws other masks than in the whole, and the same ones in both passes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from lightning_qlora.kernels.lora_linear import refuse_second_derivative
from lightning_qlora.tensors.values import has_values

Function = Callable[[Tensor], Tensor]


class Tiles(NamedTuple):
    """The number of tiles, and the last dimension and the type of the output."""

    number: int
    width: int
    dtype: torch.dtype


def compute_in_tiles(
    function: Function, x: Tensor, trained: Sequence[Tensor], count: int, tiles: Tiles | None = None
) -> tuple[Tensor, Tiles]:
    """f(x) for x [..., rows, width], with gradients for x and for what trains; and what a recomputed call passes."""
    flat = x.reshape(*[1] * (x.ndim - 2), -1, x.shape[-1])
    parts = _split(flat.detach(), count)
    state = CallState(x)
    first = None
    if tiles is None:
        first = _value(function, parts[0])
        tiles = Tiles(count, first.shape[-1], first.dtype)
    y = x.new_empty(*flat.shape[:-1], tiles.width, dtype=tiles.dtype)
    y = _Gradient.apply(y, flat, (function, count, state), *trained)  # type: ignore[no-untyped-call]
    for part, output in zip(parts, _split(y.detach(), count), strict=True):
        output.copy_(_value(function, part) if first is None else first)
        first = None
    return y.view(*x.shape[:-1], tiles.width), tiles


def _split(x: Tensor, count: int) -> Sequence[Tensor]:
    """The tiles; without data, as in `plan`, the first two, because the others need the same memory."""
    if not has_values(x):
        size = math.ceil(x.shape[-2] / count)
        return [x[..., :size, :], x[..., size : 2 * size, :]]
    return x.tensor_split(count, -2)


@torch.no_grad()
def _value(function: Function, x: Tensor) -> Tensor:
    y = function(x)
    _forget_casts()
    return y


class _Gradient(torch.autograd.Function):
    """The gradient of y, which `compute_in_tiles` writes after this."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, rest: tuple[Function, int, "CallState"], *trained: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(x)
        ctx.rest = rest
        ctx.trained = trained
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (x,) = ctx.saved_tensors
        function, count, state = ctx.rest
        sums = _Sums(ctx.trained)
        parts = _split(x.detach(), count)
        grad_x = None
        parts_of_grad_x: Sequence[Tensor | None] = [None] * len(parts)
        if ctx.needs_input_grad[1]:
            grad_x = torch.empty_like(x)
            parts_of_grad_x = _split(grad_x, count)
        with state.restored():
            for part, of_y, of_x in zip(parts, _split(grad, count), parts_of_grad_x, strict=True):
                _add_gradients(function, part, of_y, of_x, sums)
        return None, grad_x, None, *sums.values()


class _Sums:
    """The gradients of what trains, summed over tiles in fp32 and rounded once."""

    def __init__(self, trained: Sequence[Tensor]) -> None:
        self.trained = trained
        self._sums: list[Tensor | None] = [None] * len(trained)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for number, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = self._sums[number]
            if total is None:
                self._sums[number] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
            else:
                total += gradient

    def values(self) -> list[Tensor | None]:
        pairs = zip(self._sums, self.trained, strict=True)
        return [None if total is None else total.to(tensor.dtype) for total, tensor in pairs]


def _add_gradients(function: Function, x: Tensor, of_y: Tensor, of_x: Tensor | None, sums: _Sums) -> None:
    """Write the gradient of a tile of x, and add those of what trains; the graph of the tile is freed."""
    inputs = list(sums.trained)
    if of_x is not None:
        x = x.detach().requires_grad_()
        inputs.append(x)
    with torch.enable_grad():
        y = function(x)
    gradients = list(torch.autograd.grad(y, inputs, of_y, allow_unused=True))
    _forget_casts()
    if of_x is not None:
        gradient = gradients.pop()
        of_x.zero_() if gradient is None else of_x.copy_(gradient)
    sums.add(gradients)


def _forget_casts() -> None:
    """Forget the casts that autocast keeps: their graph is freed, or there was none."""
    if torch.is_autocast_cache_enabled():
        torch.clear_autocast_cache()


class CallState:
    """The random numbers and the autocast of a call, for a call that has to draw and to cast the same."""

    def __init__(self, x: Tensor) -> None:
        self._of_cpu = torch.get_rng_state()
        self._devices, self._of_devices = get_device_states(x)
        self._type = x.device.type
        self._autocast: tuple[Any, ...] | None = None
        if torch.amp.is_autocast_available(self._type):
            cached = torch.is_autocast_cache_enabled()
            self._autocast = torch.get_autocast_dtype(self._type), torch.is_autocast_enabled(self._type), cached

    def restore_random(self) -> None:
        torch.set_rng_state(self._of_cpu)
        set_device_states(self._devices, self._of_devices, device_type=self._type)

    @contextmanager
    def restored(self) -> Iterator[None]:
        autocast: Any = nullcontext()
        if self._autocast is not None:
            autocast = torch.autocast(self._type, *self._autocast)
        with torch.random.fork_rng(self._devices, device_type=self._type), autocast:
            self.restore_random()
            yield
