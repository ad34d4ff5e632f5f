"""TokenTiles: a part of a recomputed block that computes each token by itself runs in tiles of tokens.

So a feed-forward part, or a norm, keeps its input alone, and what it computes exists for one tile at a time. Which
parts can is found by what they do (`row_by_row.py`), and how many tiles there are by their widths: what the layers of a
tile compute takes as many bytes as the input of the part. A part whose output its block saves (a norm follows it in
Gemma 3, OLMo 2 and BERT) runs whole, because it would be computed a third time.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves

from lightning_qlora.activations.recomputed import HOOKS, OfRecomputation, watch_saved_tensors
from lightning_qlora.activations.row_by_row import NotRowByRow, values_per_input
from lightning_qlora.activations.tiled_function import CallState, Tiles, compute_in_tiles
from lightning_qlora.dtypes.instance_method import InstanceMethod, add, instance_method
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import join
from lightning_qlora.tensors.dtensor import is_sharded
from lightning_qlora.tensors.values import is_plain
from lightning_qlora.texts import groups

LEAST_ROWS = 1024  # of a tile: each decodes the weights again, which takes about as long as the products of 300 rows
OF_A_NORM = 8.0  # values that it computes for each of its input: it computes in fp32
SAVED = "its block saves its output"

Recompute = Callable[[Callable[..., Any], Any, Any], Any]  # takes a forward, its args and kwargs


class TokenTiles(OfRecomputation):
    """The forward method of a part of a block that is recomputed.

    Attributes:
        full_name: Of the part in the converted module.
        has_layers: Whether 4-bit layers are in it; it is a norm if not.
        values: How many values it computes for each value of its input; None: it was not examined yet.
        never: Why it runs whole in every call; None: it does not, or was not examined yet.
        why_whole: Why its last call with enough tokens ran whole; None: it did not.
        was_tiled: Whether a call ran in tiles.
    """

    def __init__(self, module: nn.Module, full_name: str) -> None:
        super().__init__(module)
        self.full_name = full_name
        self.has_layers = any(isinstance(part, LoRALayer) for part in module.modules())
        self.values: float | None = None
        self.never: str | None = None
        self.why_whole: str | None = None
        self.was_tiled = False

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        block = _block.get()
        if block is None or not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        return block.call_part(self, args, kwargs)

    def alone(self, x: Tensor) -> Tensor:
        """The part, and the parts in it, without tiles."""
        with _inside(None):
            y: Tensor = self.original(x)
        return y

    def count(self, args: Any, kwargs: Any) -> int:
        """How many tiles a call has; 0: it runs whole."""
        if len(args) != 1 or kwargs or not is_plain(args[0]):
            return 0
        x: Tensor = args[0]
        if not x.is_floating_point() or not is_long(x):
            return 0
        if not (x.requires_grad or self.trained):
            return 0
        self.why_whole = self.never or self._obstacle() or self._examine(x)
        if self.why_whole or self.values is None or self.values <= 1:
            return 0
        return min(math.ceil(self.values), _tokens(x) // LEAST_ROWS)

    @property
    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def _examine(self, x: Tensor) -> str | None:
        if self.values is None:
            try:
                self.values = values_per_input(self.module, self.alone, x) or OF_A_NORM
            except NotRowByRow as reason:
                self.never = str(reason)
        return self.never

    def _obstacle(self) -> str | None:
        """Why this call runs whole; the next one may not."""
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return "a transform of torch.func or forward-mode differentiation is active"
        if torch._C._get_tracing_state() is not None:
            return "it is traced"
        inner = list(self.module.modules())[1:]
        is_hooked = any(getattr(torch_module, f"_global{hooks}") for hooks in HOOKS)
        if is_hooked or any(getattr(part, hooks) for part in inner for hooks in HOOKS):
            return "modules in it have hooks"
        if any(map(_has_foreign_forward, inner)):
            return "other code replaced the forward method of a module in it"
        if any(parameter._backward_hooks or is_sharded(parameter) for parameter in self.module.parameters()):
            return "its parameters have hooks, or are split over ranks"
        if any(isinstance(part, LoRALayer) and part.input_observer is not None for part in inner):
            return "its layers wait for inputs"
        return None


class BlockCall:
    """The forward pass of one call of a block. Recomputation calls it again: its parts then do what they did before.

    Attributes:
        saved: Parts that ran in tiles, and whose output was saved after that.
    """

    def __init__(self, forward: Callable[..., Any], seen: "WeakSet[TokenTiles]") -> None:
        self.forward = forward
        self.seen = seen
        self.saved: list[TokenTiles] = []
        self._parts: list[Tiles | None] = []  # how each call of a part ran, in order; None: whole
        self._again: Iterator[Tiles | None] = iter(())  # these, when the block is recomputed
        self._has_run = False
        self._last: TokenTiles | None = None  # ran in tiles, and nothing was saved since

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._again = iter(self._parts)
        with _inside(self), nullcontext() if self._has_run else watch_saved_tensors(self._notice_saved):
            output = self.forward(*args, **kwargs)
        self._has_run = True
        return output

    def call_part(self, part: TokenTiles, args: Any, kwargs: Any) -> Any:
        if self._has_run:
            tiles = next(self._again)
            if tiles is None:
                return part.original(*args, **kwargs)
            return compute_in_tiles(part.alone, args[0], part.trained, tiles.number, tiles)[0]
        self.seen.add(part)
        count = part.count(args, kwargs)
        if not count:
            self._parts.append(None)
            return part.original(*args, **kwargs)
        y, tiles = compute_in_tiles(part.alone, args[0], part.trained, count)
        self._parts.append(tiles)
        part.was_tiled = True
        self._last = part if part.has_layers else None
        return y

    def _notice_saved(self, _: Tensor) -> None:
        """What is saved after a part is its output."""
        if self._last is not None:
            self._last.never = SAVED
            self.saved.append(self._last)
            self._last = None


_block: ContextVar[BlockCall | None] = ContextVar("block", default=None)


@contextmanager
def _inside(block: BlockCall | None) -> Iterator[None]:
    token = _block.set(block)
    try:
        yield
    finally:
        _block.reset(token)


def recomputed_in_tiles(
    recompute: Recompute, forward: Callable[..., Any], args: Any, kwargs: Any, seen: "WeakSet[TokenTiles]"
) -> Any:
    """The output of a block whose parts run in tiles; `recompute` lets it be computed again; `seen` gets its parts."""
    x = next(tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor))
    state = CallState(x)
    while True:
        call = BlockCall(forward, seen)
        output = recompute(call, args, kwargs)
        if not call.saved:
            return output
        del output  # parts would be computed three times: from now on they run whole
        state.restore_random()


def is_long(x: Tensor) -> bool:
    """Whether there are enough tokens for two tiles."""
    return _tokens(x) >= 2 * LEAST_ROWS


def _tokens(x: Tensor) -> int:
    return math.prod(x.shape[:-1]) if x.ndim > 1 else 0


def let_run_in_tiles(block: nn.Module, name: str) -> None:
    """Let the feed-forward parts and the norms of a block run in tiles of tokens, where they can."""
    for key, child in block.named_children():
        if isinstance(child, LoRALayer):
            continue
        is_list = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        method = TokenTiles(child, join(name, key))
        if (method.has_layers or _is_norm(child)) and not is_list and instance_method(child, TokenTiles) is None:
            add(method)
        let_run_in_tiles(child, join(name, key))


def _is_norm(part: nn.Module) -> bool:
    """Whether a module has vectors alone, as a norm. Those of torch keep their input alone without tiles."""
    parameters = list(part.parameters())
    is_leaf = next(part.children(), None) is None
    return is_leaf and bool(parameters) and all(p.ndim == 1 for p in parameters) and not _is_of(type(part), "torch.nn")


def _is_of(value: Any, package: str) -> bool:
    return f"{getattr(value, '__module__', '')}.".startswith(f"{package}.")


def _has_foreign_forward(part: nn.Module) -> bool:
    method: Any = vars(part).get("forward")
    while isinstance(method, InstanceMethod):
        method = method.before
    return method is not None and not _is_of(getattr(method, "func", method), "lightning_qlora")


def describe_tiles(methods: Iterable[TokenTiles]) -> str:
    """Which parts ran in tiles, and why others did not, in one line; empty if no call was long enough."""
    methods = sorted(methods, key=lambda method: method.full_name)
    whole: dict[str, list[str]] = {}
    for method in methods:
        if method.why_whole is not None:
            whole.setdefault(method.why_whole, []).append(method.full_name)
    tiled = [method.full_name for method in methods if method.was_tiled and method.why_whole is None]
    texts = [f"in tiles of tokens: {groups(tiled)}"] if tiled else []
    texts += [f"whole, because {reason}: {groups(names)}" for reason, names in whole.items()]
    return "; ".join(texts)
