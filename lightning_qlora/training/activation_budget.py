"""ActivationBudget: how many blocks of a step may keep their activations, decided at each call by what still fits.

    kept + size <= limit - base - rest        the block keeps its activations; else they are recomputed

`limit` is what the device has, or what the user allows; `base` is what is allocated when a step begins; `rest` is what
a step allocates at its peak beside the activations of blocks, measured in the first step, in which all blocks are
recomputed. `size` is measured at the first call of a class of blocks that keeps them, and again for longer inputs.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.texts import size_text

MARGIN = 0.05  # of the limit: fragmentation, and what differs from step to step


class Memory(NamedTuple):
    """Bytes of this process on a device."""

    used: int  # now
    peak: int  # the most so far
    available: int  # for this process, what it uses included


def memory_of(device: torch.device) -> Memory | None:
    """What a process has of a device; None where it can't be read (CPUs without /proc)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        available = free + torch.cuda.memory_reserved(device)
        return Memory(torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device), available)
    status, system = _kilobytes("/proc/self/status"), _kilobytes("/proc/meminfo")
    if device.type != "cpu" or not {"VmRSS", "VmHWM"} <= status.keys() or "MemAvailable" not in system:
        return None
    free = system["MemAvailable"]
    try:  # the limit of a container
        limit, current = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - current)
    except (OSError, ValueError):
        pass
    return Memory(status["VmRSS"], status["VmHWM"], status["VmRSS"] + free)


def _kilobytes(path: str) -> dict[str, int]:
    """The rows `NAME: NUMBER kB` of a file of Linux, in bytes."""
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    return {name: 1024 * int(number) for name, number in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


class ActivationBudget:
    """The activations that the blocks of one module keep. A copy of the module has a budget of its own.

    Attributes:
        limit: Bytes that the process may use on the device; None: what the device has.
        rest: Bytes of a step at its peak without kept activations, beyond those when it begins; None: not measured yet.
        blocks, kept_blocks, kept_bytes, capacity: Of the last step: its calls of blocks, those that keep their
            activations, their bytes, and how many bytes there were for them.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.rest: int | None = None
        self.blocks = self.kept_blocks = self.kept_bytes = self.capacity = 0
        self._sizes: dict[type[nn.Module], dict[int, int]] = {}  # class of a block -> elements of its input: bytes
        self._live: dict[int, int] = {}  # calls whose backward pass has not begun: bytes that they keep
        self._base = 0
        self._first: tuple[Memory, int] | None = None  # when the first step began, and the elements of its input
        self._ran_backward = self._was_told = False

    def __reduce__(self) -> Any:
        return type(self), (self.limit,)

    def __str__(self) -> str:
        if self.rest is None:
            return "all blocks are recomputed in the first step, which measures what fits"
        return (
            f"of {self.blocks} blocks {self.kept_blocks} keep their activations "
            f"({size_text(self.kept_bytes, 1024)} of {size_text(self.capacity, 1024)})"
        )

    def keeps(self, block: nn.Module, inputs: Any) -> bool:
        """Whether a call of a block keeps its activations."""
        tensors = _floats(inputs)
        elements = _elements(tensors)
        if not self._live and tensors:
            self._begin_step(tensors[0].device, elements)
        self.blocks += 1
        size = self._size(block, elements)
        return self.rest is not None and sum(self._live.values()) + (size or 0) <= self.capacity

    def _begin_step(self, device: torch.device, elements: int) -> None:
        memory = memory_of(device)
        self.blocks = self.kept_blocks = self.kept_bytes = 0
        if memory is None:
            return
        if self._first is None:
            self._first = memory, elements
        first, first_elements = self._first
        if self.rest is None:
            if not self._ran_backward:
                return
            self.rest = memory.peak - first.used
            self._base = memory.used
        if device.type == "cuda":
            self._base = memory.used
        else:  # a CPU's allocator holds back memory that was freed, which the next step uses again
            held_back = self.rest + max(self.capacity, 0)
            self._base = max(min(self._base, memory.used), memory.used - held_back)
        limit = memory.available
        if self.limit is not None:
            limit = min(limit, self.limit)
        rest = self.rest * max(1.0, elements / max(first_elements, 1))  # logits grow with the input
        self.capacity = int(limit * (1 - MARGIN) - self._base - rest)

    def _size(self, block: nn.Module, elements: int) -> int | None:
        """Bytes that a call keeps: measured, or of a shorter input in proportion; None: nothing is known."""
        sizes = self._sizes.get(type(block), {})
        if elements in sizes or not sizes:
            return sizes.get(elements)
        return int(elements * max(size / max(known, 1) for known, size in sizes.items()))

    def run(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A call that keeps its activations."""
        elements = _elements(_floats((args, kwargs)))
        sizes = self._sizes.setdefault(type(block), {})
        if elements in sizes:
            output = forward(*args, **kwargs)
        else:
            output, sizes[elements] = _measured(block, forward, args, kwargs)
        self.kept_blocks += 1
        self.kept_bytes += sizes[elements]
        self.watch(output, sizes[elements])
        return output

    def watch(self, output: Any, size: int = 0) -> None:
        """Count the bytes of a call until its backward pass begins, or its graph is freed."""
        nodes = [tensor.grad_fn for tensor in _floats(output) if tensor.grad_fn is not None]
        if nodes:
            nodes[0].register_prehook(_Call(self, size))

    def end(self, call: int, in_backward: bool) -> None:
        """The activations of a call are no longer counted."""
        self._live.pop(call, None)
        self._ran_backward = self._ran_backward or in_backward
        if in_backward and self.rest is not None and not self._was_told:
            self._was_told = True
            rank_zero_info(f"QLoRA: {self}.")

    def begin(self, call: int, size: int) -> None:
        """The activations of a call are counted."""
        self._live[call] = size


class _Call:
    """A hook of the graph of one call: it lives as long as the graph, and is called when its backward pass begins."""

    def __init__(self, budget: ActivationBudget, size: int) -> None:
        self._budget = budget
        budget.begin(id(self), size)

    def __call__(self, *_: Any) -> None:
        self._budget.end(id(self), in_backward=True)

    def __del__(self) -> None:
        self._budget.end(id(self), in_backward=False)


def _floats(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _elements(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _measured(block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, int]:
    """The output of a call, and the bytes that autograd saves for it beside its inputs and what the block holds."""
    own = [*block.parameters(), *block.buffers(), *_floats((args, kwargs))]
    own += [tensor for part in block.modules() if isinstance(part, PackedLayer) for tensor in part.weight_bytes[:3]]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(*args, **kwargs)
    return output, sum(saved.values())
