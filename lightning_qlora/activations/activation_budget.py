"""ActivationBudget: which blocks of a step keep their activations, decided at each call by what still fits.

    kept + size <= capacity = limit * (1 - MARGIN) - base - rest        the block keeps them; else it is recomputed

`limit` is what the device has, or what the user allows; `base` is what is allocated when a step begins; `rest` is what
a step allocates at its peak beside kept activations, measured in the first step, in which all blocks are recomputed,
and in each that needs more than all before. `size` is measured when a block keeps its activations, and again for larger
inputs. Inside a `torch.utils.checkpoint` of other code all blocks are recomputed.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qlora.activations.device_memory import Memory, memory_of
from lightning_qlora.activations.host_inputs import HostInputs
from lightning_qlora.activations.recomputed import (
    is_in_backward_pass,
    recomputed,
    saved_tensor_hooks,
    watch_saved_tensors,
)
from lightning_qlora.activations.token_tiles import in_tiles, is_long
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.texts import size_text

MARGIN = 0.05  # of the limit: fragmentation, and what differs from step to step


class ActivationBudget:
    """The activations that the blocks of one module keep. A copy of the module has a budget of its own.

    Attributes:
        limit: Bytes that the process may use on the device; None: what the device has.
        recomputes_all: Whatever fits: with "offload", and where ranks hold parts of the blocks and must do the same.
        keeps: Whether the block that is called keeps its activations.
        rest: Bytes of a step at its peak without kept activations, beyond those when it begins; None: not measured yet.
        capacity: Bytes for the activations of a step; None: not known yet.
        blocks, kept_blocks, kept_bytes: Of the last step: calls of blocks, those that keep their activations, bytes.
        host: The inputs of recomputed blocks that wait on the host (`host_inputs.py`).
    """

    def __init__(self, limit: int | None, recomputes_all: bool = False) -> None:
        self.limit = limit
        self.recomputes_all = recomputes_all
        self.keeps = False
        self.rest: int | None = None
        self.capacity: int | None = None
        self.blocks = self.kept_blocks = self.kept_bytes = 0
        self.host = HostInputs()
        self._calls: WeakSet[_Call] = WeakSet()  # those whose backward pass has not begun
        self._sizes: WeakKeyDictionary[Any, tuple[torch.Size, int]] = WeakKeyDictionary()  # of blocks and classes
        self._begin: tuple[Memory, int] | None = None  # of the last step, with the elements of its input
        self._elements = 0  # of the input of the step that `rest` is from

    def __reduce__(self) -> Any:
        return type(self), (self.limit, self.recomputes_all)

    def __str__(self) -> str:
        if self.capacity is None:
            text = "all blocks are recomputed"
        else:
            sizes = f"{size_text(self.kept_bytes, 1024)} of {size_text(max(self.capacity, 0), 1024)}"
            text = f"of {self.blocks} blocks {self.kept_blocks} keep their activations ({sizes})"
        return f"{text}; {size_text(self.host.nbytes, 1024)} of inputs wait on the host" if self.host.nbytes else text

    def plan(self, host_room: float | None) -> None:
        """Begin again, for steps without data. `host_room`: bytes of the host for inputs of blocks; None: on a CPU."""
        self.host = HostInputs(is_planned=True, room=host_room or 0)
        self.capacity = None

    def call(self, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The output of a block, which keeps its activations if they fit."""
        self.keeps = False
        inputs = _floats((args, kwargs))
        if not inputs or is_in_backward_pass() or saved_tensor_hooks() is not None:
            return recomputed(forward, args, kwargs)
        x = inputs[0]
        if self.recomputes_all:
            return self._recomputed(forward, args, kwargs, x)
        if not self._calls:
            self._begin_step(x)
        self.blocks += 1
        shape, known = self._sizes.get(block) or self._sizes.get(type(block)) or (x.shape, 0)
        size = int(known * max(1.0, x.numel() / max(shape.numel(), 1)))
        self.keeps = self._fits(size)
        if not self.keeps:
            size = x.nbytes if self.host.can_take(x) and self._fits(x.nbytes) else 0
            output = self._recomputed(forward, args, kwargs, x, on_device=size > 0)
        elif block in self._sizes and len(shape) == x.ndim and all(map(int.__le__, x.shape, shape)):
            output = forward(*args, **kwargs)
        else:
            output, size = _measured(block, forward, args, kwargs)
            self._sizes[block] = self._sizes[type(block)] = x.shape, size
        self.kept_blocks += self.keeps
        self.kept_bytes += size
        node = next((tensor.grad_fn for tensor in _floats(output) if tensor.grad_fn is not None), None)
        if node is not None:
            node.register_prehook(_Call(self, size, x.device))
        return output

    def _recomputed(self, forward: Any, args: Any, kwargs: Any, x: Tensor, on_device: bool = False) -> Any:
        recompute = recomputed if on_device else self.host.recomputed
        return recompute(in_tiles(forward) if is_long(x) else forward, args, kwargs)

    def _fits(self, size: int) -> bool:
        return self.capacity is not None and sum(call.size for call in self._calls) + size <= self.capacity

    def _begin_step(self, x: Tensor) -> None:
        self.blocks = self.kept_blocks = self.kept_bytes = 0
        if self.host.is_planned:
            return
        memory = memory_of(x.device, begins=self._begin is None)
        if memory is None:
            return
        if x.device.type == "cpu" and self._begin is not None:  # later RSS has what glibc keeps of freed activations
            memory = memory._replace(used=self._begin[0].used)
        self._begin = memory, x.numel()
        if self.rest is not None:
            growth = max(1.0, x.numel() / max(self._elements, 1))  # logits grow with the input
            self.set_capacity(memory.available, memory.used + self.rest * growth)

    def set_capacity(self, available: float, needed: float) -> None:
        """Keep what fits beside the bytes that a step needs without kept activations."""
        is_first = self.capacity is None and not self.host.is_planned
        available = min(available, self.limit) if self.limit is not None else available
        self.capacity = int(available * (1 - MARGIN) - needed)
        if is_first:
            rank_zero_info(f"QLoRA: {size_text(max(self.capacity, 0), 1024)} for activations of blocks.")

    def begin_backward(self, call: "_Call", device: torch.device) -> None:
        """Stop counting the activations of a call; at the last one learn what the step needed beside them."""
        self._calls.discard(call)
        if self._calls or self._begin is None:
            return
        begin, elements = self._begin
        memory = memory_of(device)
        if memory is None:
            return
        rest = memory.peak - begin.used - self.kept_bytes
        if self.rest is None or (memory.peak > begin.peak and rest > self.rest):
            self.rest, self._elements = rest, elements


class _Call:
    """A hook of the graph of one call: it lives as long as the graph, and is called when its backward pass begins."""

    def __init__(self, budget: ActivationBudget, size: int, device: torch.device) -> None:
        self.size = size  # bytes
        self._budget = budget
        self._device = device
        budget._calls.add(self)

    def __call__(self, *_: Any) -> None:
        self._budget.begin_backward(self, self._device)


def _floats(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


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
