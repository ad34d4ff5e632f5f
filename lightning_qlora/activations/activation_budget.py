"""ActivationBudget: which blocks of a step keep their activations, decided at each call by what still fits.

    kept + size <= capacity = limit * (1 - MARGIN) - base - rest        the block keeps them; else it is recomputed

`limit` is what the device has, or what the user allows; `base` is what is allocated when a step begins; `rest` is what
a step allocates at its peak beside kept activations, measured in the first step, in which all blocks are recomputed,
and in each that needs more than all before. `size` is measured when a block keeps its activations, and again for larger
inputs.

A block inside a `torch.utils.checkpoint`, or other saved-tensor hooks, that are not ours is always recomputed: that
code may run the block again, and both runs have to save the same tensors.
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qlora.activations.device_memory import Memory, memory_of, reset_peak
from lightning_qlora.activations.host_inputs import HostInputs, PlannedHostMemory
from lightning_qlora.activations.recomputed import (
    is_in_backward_pass,
    recomputed,
    saved_tensor_hooks,
    watch_saved_tensors,
)
from lightning_qlora.activations.token_tiles import (
    TokenTiles,
    describe_tiles,
    is_long,
    let_run_in_tiles,
    recomputed_in_tiles,
)
from lightning_qlora.checks import memory_limit
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.texts import size_text

MARGIN = 0.05  # of the limit: fragmentation, and what differs from step to step
INSIDE_HOOKS = (
    "blocks inside a torch.utils.checkpoint or torch.autograd.graph.saved_tensors_hooks of other code are recomputed, "
    "because it may run them again, and both runs must save the same tensors"
)


class ActivationBudget:
    """The activations that the blocks of one module keep. A copy of the module has a budget of its own.

    Attributes:
        limit: Bytes that the process may use on the device; None: what the device has.
        is_shared: Whether ranks hold parts of the blocks: they must do the same, so all blocks are recomputed.
        offloads: Whether all blocks are recomputed, whatever fits.
        keeps: Whether the block that is called keeps its activations.
        is_inside_hooks: Whether blocks ran inside saved-tensor hooks of other code, where they are recomputed.
        memory_of: Reads a device; None: `set_capacity` alone decides, as in `plan`.
        rest: Bytes of a step at its peak without kept activations, beyond those when it begins; None: not measured yet.
        capacity: Bytes for the activations of a step; None: not known yet.
        blocks, kept_blocks, kept_bytes: Of the last step: calls of blocks, those that keep their activations, bytes.
        host: The inputs of recomputed blocks that wait on the host (`host_inputs.py`).
        parts: The parts of recomputed blocks that had enough tokens for tiles (`token_tiles.py`).
    """

    def __init__(self, limit: int | None, is_shared: bool = False, offloads: bool = False) -> None:
        self.limit = limit
        self.is_shared = is_shared
        self.offloads = offloads
        self.keeps = False
        self.is_inside_hooks = False
        self.memory_of: Callable[[torch.device], Memory | None] | None = memory_of
        self.rest: int | None = None
        self.capacity: int | None = None
        self.blocks = self.kept_blocks = self.kept_bytes = 0
        self.host = HostInputs()
        self.parts: WeakSet[TokenTiles] = WeakSet()
        self._calls: WeakSet[_Call] = WeakSet()  # those of this step whose backward pass has not begun
        self._count = 0  # of all calls so far
        self._last_begun = 0  # the number of the last call whose backward pass has begun
        self._sizes: WeakKeyDictionary[Any, tuple[list[torch.Size], int]] = WeakKeyDictionary()  # of blocks and classes
        self._begin: tuple[torch.device, Memory, int] | None = None  # of the last step, with the elements of its input
        self._elements = 0  # of the input of the step that `rest` is from
        self._was_told = False

    def __reduce__(self) -> Any:
        return type(self), (self.limit, self.is_shared, self.offloads)

    def __str__(self) -> str:
        return "; ".join(text for text in (self._kept(), str(self.host), describe_tiles(self.parts)) if text)

    def _kept(self) -> str:
        if self.offloads:
            text = "all blocks are recomputed"
            return f"{text}; on this device their inputs are not copied to the host" if self.host.is_here else text
        if self.is_shared:
            return "all blocks are recomputed, because ranks that hold parts of them must do the same"
        if self.is_inside_hooks and not self.blocks:
            return INSIDE_HOOKS
        if self.capacity is None:
            return "all blocks are recomputed until a step has measured what fits"
        text = (
            f"of {self.blocks} blocks {self.kept_blocks} keep their activations "
            f"({size_text(self.kept_bytes, 1024)} of {size_text(max(self.capacity, 0), 1024)})"
        )
        return f"{text}; {INSIDE_HOOKS}" if self.is_inside_hooks else text

    def add(self, block: nn.Module, name: str) -> None:
        """Let the parts of a block that is recomputed run in tiles."""
        let_run_in_tiles(block, name)

    def plan(self, host_room: float | None) -> None:
        """Begin again, for steps without data. `host_room`: bytes of the host for inputs of blocks; None: on a CPU."""
        self.host = HostInputs()
        self.memory_of = None
        self.capacity = None
        if host_room is not None:
            self.host.memory_on = partial(PlannedHostMemory, room=host_room)

    def call(self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The output of a block, which keeps its activations if they fit."""
        self.keeps = False
        if is_in_backward_pass():
            return recomputed(forward, args, kwargs)
        if saved_tensor_hooks() is not None:  # of `checkpoint`, `save_on_cpu`, or of the user
            if not self.is_inside_hooks:
                self.is_inside_hooks = True
                rank_zero_info(f"QLoRA: {INSIDE_HOOKS}.")
            return recomputed(forward, args, kwargs)
        inputs = _floats((args, kwargs))
        if self.is_shared or self.offloads:
            return self._recomputed(forward, args, kwargs, inputs)
        # Older ones than the last that ran backward are what an error or a kept output left: no call of this step.
        if inputs and all(call.number < self._last_begun for call in self._calls):
            self._begin_step(inputs[0])
        self.blocks += 1
        shapes = [tensor.shape for tensor in inputs]
        measured = self._sizes.get(block)
        known, size = measured or self._sizes.get(type(block), (shapes, 0))
        size = int(size * _growth(shapes, known))
        self.keeps = self._fits(size)
        if not self.keeps:
            could_wait = bool(inputs) and self.host.memory(inputs[0].device) is not None
            size = inputs[0].nbytes if could_wait and self._fits(inputs[0].nbytes) else 0
            output = self._recomputed(forward, args, kwargs, inputs, on_device=size > 0)
        elif measured and _is_within(shapes, known):
            output = forward(*args, **kwargs)
        else:
            output, size = _measured(block, forward, args, kwargs)
            self._sizes[block] = self._sizes[type(block)] = shapes, size
        self.kept_blocks += self.keeps
        self.kept_bytes += size
        node = next((tensor.grad_fn for tensor in _floats(output) if tensor.grad_fn is not None), None)
        if node is not None:
            node.register_prehook(_Call(self, size))
        return output

    def size_of(self, block: nn.Module) -> int:
        """Bytes that a block kept when it was measured; 0: it was not."""
        return self._sizes.get(block, ([], 0))[1]

    def _recomputed(
        self, forward: Callable[..., Any], args: Any, kwargs: Any, inputs: list[Tensor], on_device: bool = False
    ) -> Any:
        recompute = recomputed if on_device else partial(self.host.recomputed, recomputed)
        if inputs and is_long(inputs[0]):
            return recomputed_in_tiles(recompute, forward, args, kwargs, self.parts)
        return recompute(forward, args, kwargs)

    def _fits(self, size: int) -> bool:
        return self.capacity is not None and sum(call.size for call in self._calls) + size <= self.capacity

    def _begin_step(self, x: Tensor) -> None:
        self._calls = WeakSet()
        self.blocks = self.kept_blocks = self.kept_bytes = 0
        if self.memory_of is None:
            return
        if self._begin is None:
            gc.collect()  # else garbage counts as used when the step begins, and is free at its peak
            reset_peak(x.device)
        memory = self.memory_of(x.device)
        if memory is None:
            return
        self._begin = x.device, memory, x.numel()
        if self.rest is not None:
            growth = max(1.0, x.numel() / max(self._elements, 1))  # logits grow with the input
            self.set_capacity(memory.available, memory.used + self.rest * growth)

    def set_capacity(self, available: float, needed: float) -> None:
        """Keep what fits beside the bytes that a step needs without kept activations."""
        if self.limit is not None:
            available = min(available, self.limit)
        self.capacity = int(available * (1 - MARGIN) - needed)

    def begin_backward(self, call: "_Call") -> None:
        """Stop counting the activations of a call; at the last one learn what the step needed beside them."""
        self._last_begun = max(self._last_begun, call.number)
        if call not in self._calls:
            return
        self._calls.remove(call)
        if self._calls or self._begin is None or self.memory_of is None:
            return
        if self.capacity is not None and not self._was_told:
            self._was_told = True
            rank_zero_info(f"QLoRA: {self}.")
        device, begin, elements = self._begin
        memory = self.memory_of(device)
        if memory is None:
            return
        rest = memory.peak - begin.used - self.kept_bytes
        if self.rest is None or (memory.peak > begin.peak and rest > self.rest):
            self.rest = rest
            self._elements = elements


class _Call:
    """A hook of the graph of one call: it lives as long as the graph, and is called when its backward pass begins."""

    def __init__(self, budget: ActivationBudget, size: int) -> None:
        self.size = size  # bytes
        self._budget = budget
        budget._count += 1
        self.number = budget._count
        budget._calls.add(self)

    def __call__(self, *_: Any) -> None:
        self._budget.begin_backward(self)


def budget_for(setting: int | str, is_shared: bool) -> ActivationBudget:
    """What decides with a value of `gradient_checkpointing` other than True."""
    limit = None if setting in ("auto", "offload") else memory_limit(setting)
    return ActivationBudget(limit, is_shared, setting == "offload")


def _floats(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _growth(shapes: list[torch.Size], known: list[torch.Size]) -> float:
    """How many times more bytes a call needs than a known one: at most, if its inputs are smaller."""
    pairs = zip(shapes, known, strict=False)
    return max((shape.numel() / max(other.numel(), 1) for shape, other in pairs), default=1.0)


def _is_within(shapes: list[torch.Size], known: list[torch.Size]) -> bool:
    """Whether no dimension is larger: attention may keep more for longer rows, although there are fewer of them."""
    if [len(shape) for shape in shapes] != [len(shape) for shape in known]:
        return False
    return all(size <= other for pair in zip(shapes, known, strict=True) for size, other in zip(*pair, strict=True))


def _measured(block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, int]:
    """The output of a call, and the bytes that autograd saves for it beside its inputs and what the block holds."""
    own = [*block.parameters(), *block.buffers(), *_floats((args, kwargs))]
    own += [tensor for part in block.modules() if isinstance(part, PackedLayer) for tensor in part.weight_bytes[:3]]
    known = {tensor.untyped_storage()._cdata for tensor in own}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()

    with watch_saved_tensors(note):
        output = forward(*args, **kwargs)
    return output, sum(saved.values())
