"""TokenTiles: the feed-forward part, and the norms, of a recomputed block run in tiles of tokens.

    forward     y[tile] = f(x[tile])                                    without a graph
    backward    dx[tile], dw += gradients of f(x[tile]) for dy[tile]    each tile again, with a graph of its own

So a part keeps its input alone, and what it computes exists for one tile at a time. Which parts can is known by what
they are made of: a part that is called a feed-forward part, or an nn.Sequential, of linear layers, norms, activations
and dropout, which compute each token by itself. Dropout draws other masks than in the whole.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from lightning_qlora.activations.recomputed import HOOKS, OfRecomputation
from lightning_qlora.dtypes.instance_method import add, instance_method
from lightning_qlora.kernels.lora_linear import refuse_second_derivative
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.tensors.dtensor import is_sharded
from lightning_qlora.tensors.values import has_values, is_plain

LEAST_ROWS = 1024  # of a tile: each decodes the weights again, which takes about as long as the products of 300 rows
CHECKED_ROWS = 64
OF_A_NORM = 8.0  # values that it computes for each of its input: it computes in fp32
FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|dense(relu|act|gated)", re.IGNORECASE)  # in names and classes
OF_TOKENS = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "transformers.activations")
NORM_BEHIND = "post_feedforward_layernorm"  # Gemma and OLMo: it saves the output, so a part would be computed thrice

_in_tiles: ContextVar[bool] = ContextVar("in_tiles", default=False)


class TokenTiles(OfRecomputation):
    """The forward method of a part of a block that is recomputed.

    Attributes:
        values: How many values it computes for each value of its input.
        was_tiled: Whether a call ran in tiles.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.values = _values(module)
        self.was_tiled = False
        self._outputs: dict[Any, tuple[int, torch.dtype]] = {}  # type and autocast of the input -> output

    def call(self, *args: Any, **kwargs: Any) -> Any:
        count = 0
        if not torch.compiler.is_compiling() and _in_tiles.get() and torch.is_grad_enabled() and not kwargs:
            count = self._count(*args)
        return self._call_in_tiles(args[0], count) if count > 1 else self.original(*args, **kwargs)

    def _count(self, x: Any, *others: Any) -> int:
        """How many tiles a call has."""
        parts = [part for part in self.module.modules() if part is not self.module]
        if (
            others
            or not is_plain(x)
            or not x.is_floating_point()
            or not (x.requires_grad or self._trained())
            or any(getattr(part, hooks) for part in parts for hooks in HOOKS)
            or any(part.input_observer is not None for part in parts if isinstance(part, QLoRALinear))
            or any(map(is_sharded, self.module.parameters()))
        ):
            return 0
        return min(math.ceil(self.values), _tokens(x) // LEAST_ROWS)

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _call_in_tiles(self, x: Tensor, count: int) -> Tensor:
        """The node of the graph is made on the empty output: recomputation stops there, before the values."""
        flat = x.reshape(*[1] * (x.ndim - 2), -1, x.shape[-1])
        parts = _split(flat.detach(), count)
        state = _state(x)
        key = x.dtype, torch.is_autocast_enabled(x.device.type)
        first = None
        if key not in self._outputs:
            first = self._value(parts[0])
            if not self._is_row_by_row(parts[0], first):
                self.values = 0.0
                return self.original(x)  # type: ignore[no-any-return]
            self._outputs[key] = first.shape[-1], first.dtype
        self.was_tiled = True
        width, dtype = self._outputs[key]
        y = x.new_empty(*flat.shape[:-1], width, dtype=dtype)
        y = _InTiles.apply(y, flat, (self.original, count, state), *self._trained())  # type: ignore[no-untyped-call]
        for part, output in zip(parts, _split(y.detach(), count), strict=True):
            output.copy_(self._value(part) if first is None else first)
            first = None
        tiled: Tensor = y.view(*x.shape[:-1], width)
        return tiled

    def _is_row_by_row(self, x: Tensor, y: Tensor) -> bool:
        """Whether rows in the middle have the same result alone. With dropout they have not, so it is not asked."""
        drops = any(getattr(part, "p", 0.0) or getattr(part, "lora_dropout", 0.0) for part in self.module.modules())
        if drops or not has_values(x):
            return True
        middle = slice(x.shape[-2] // 2, x.shape[-2] // 2 + min(CHECKED_ROWS, x.shape[-2] // 4))
        alone = self._value(x[..., middle, :]).float()
        rows = y[..., middle, :].float()
        return bool((alone - rows).norm() <= 0.05 * rows.norm())

    @torch.no_grad()
    def _value(self, x: Tensor) -> Tensor:
        y: Tensor = self.original(x)
        torch.clear_autocast_cache()  # of casts without a graph
        return y


class _InTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, rest: Any, *trained: Tensor) -> Tensor:
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
        sums: list[Tensor | None] = [None] * len(ctx.trained)
        grad_x = torch.empty_like(x)
        tiles = zip(_split(x.detach(), count), _split(grad, count), _split(grad_x, count), strict=True)
        with _restored(x, state), torch.enable_grad():
            for tile, of_y, of_tile in tiles:
                tile = tile.detach().requires_grad_()
                found = torch.autograd.grad(function(tile), [tile, *ctx.trained], of_y, allow_unused=True)
                torch.clear_autocast_cache()
                of_tile.zero_() if found[0] is None else of_tile.copy_(found[0])
                sums = [b if a is None or b is None else a + b for a, b in zip(sums, found[1:], strict=True)]
        return None, grad_x if ctx.needs_input_grad[1] else None, None, *sums


def _split(x: Tensor, count: int) -> Any:
    """The tiles; without data, as in `plan`, the first two, because the others need the same memory."""
    if has_values(x):
        return x.tensor_split(count, -2)
    size = math.ceil(x.shape[-2] / count)
    return [x[..., :size, :], x[..., size : 2 * size, :]]


def _state(x: Tensor) -> Any:
    """The random numbers and the autocast of a call."""
    kind = x.device.type
    autocast = None
    if torch.amp.is_autocast_available(kind):
        autocast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled()
    return autocast, torch.get_rng_state(), get_device_states(x)


@contextmanager
def _restored(x: Tensor, state: Any) -> Iterator[None]:
    autocast, of_cpu, (devices, of_devices) = state
    kind = x.device.type
    with (
        torch.random.fork_rng(devices, device_type=kind),
        torch.autocast(kind, *autocast) if autocast else nullcontext(),
    ):
        torch.set_rng_state(of_cpu)
        set_device_states(devices, of_devices, device_type=kind)
        yield


def in_tiles(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward pass of a block, in both passes, with its parts in tiles."""

    def function(*args: Any, **kwargs: Any) -> Any:
        token = _in_tiles.set(True)
        try:
            return forward(*args, **kwargs)
        finally:
            _in_tiles.reset(token)

    return function


def is_long(x: Tensor) -> bool:
    """Whether there are enough tokens for two tiles."""
    return _tokens(x) >= 2 * LEAST_ROWS


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1]) if x.ndim > 1 else 0


def let_run_in_tiles(block: nn.Module) -> None:
    """Let the feed-forward parts and the norms of a block run in tiles of tokens, where they can."""
    for child in block.children():
        if isinstance(child, QLoRALinear):
            continue
        is_behind = hasattr(block, NORM_BEHIND) and not _is_norm(child)
        if _values(child) and not is_behind and instance_method(child, TokenTiles) is None:
            add(TokenTiles(child))
        else:
            let_run_in_tiles(child)


def _values(part: nn.Module) -> float:
    """How many values a part computes for each of its input; 0: it may need other tokens."""
    if _is_norm(part):
        return OF_A_NORM
    if not _is_feed_forward(part):
        return 0.0
    layers = [layer for layer in part.modules() if isinstance(layer, (nn.Linear, QLoRALinear))]
    if not any(isinstance(layer, QLoRALinear) for layer in layers):
        return 0.0
    return sum(layer.out_features for layer in layers) / layers[0].in_features


def _is_feed_forward(part: nn.Module) -> bool:
    if isinstance(part, (nn.Linear, QLoRALinear)) or _is_norm(part):
        return True
    if part._parameters or part._buffers:
        return False
    children = [child for child in part.children() if child is not None]
    if not children:  # `dim`: of softmax, which may be over tokens
        return isinstance(part, nn.Identity) or (type(part).__module__ in OF_TOKENS and not hasattr(part, "dim"))
    is_named = type(part) in (nn.Sequential, nn.ModuleList) or FEED_FORWARD.search(type(part).__name__)
    return bool(is_named) and all(map(_is_feed_forward, children))


def _is_norm(part: nn.Module) -> bool:
    """Whether a module is a norm with vectors alone. Those of torch keep their input alone without tiles."""
    is_of_torch = type(part).__module__.startswith("torch.nn")
    parameters = [*part._parameters.values()]
    return (
        "Norm" in type(part).__name__
        and not is_of_torch
        and not part._buffers
        and not part._modules
        and all(parameter is not None and parameter.ndim == 1 for parameter in parameters)
        and bool(parameters)
    )
