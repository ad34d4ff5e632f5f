"""In a plan, the first and the last of like blocks compute; those between only keep what the first one keeps.

In the backward pass of a block live what it computes, what the blocks before it keep, and the gradients of those after
it. The first is the same for like blocks, and the rest grows from one end to the other, so the peak is at an end: a
step of 80 blocks is counted in the time of three.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_qlora.activations.gradient_checkpointing import RecomputedForward
from lightning_qlora.activations.recomputed import HOOKS, is_in_backward_pass, watch_saved_tensors
from lightning_qlora.dtypes.instance_method import InstanceMethod, instance_method
from lightning_qlora.texts import group

PLAIN = (str, int, float, tuple, type(None))  # attributes by which blocks may differ


def skip_repeated_blocks(model: nn.Module) -> None:
    """Let the blocks between like ones of a model without data compute nothing."""
    for kind in _kinds(_recomputed(model)):
        outputs: dict[Any, Any] = {}
        for block in kind[:-1]:
            method = instance_method(block, RecomputedForward)
            assert method is not None
            method.before = _RepeatedForward(method, outputs)


def _recomputed(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The blocks that are recomputed, with their positions."""
    for container in model.modules():
        for index, block in enumerate(container.children()):
            if instance_method(block, RecomputedForward) is not None:
                yield index, block


def _kinds(blocks: Iterable[tuple[int, nn.Module]]) -> list[list[nn.Module]]:
    kinds: list[list[_Block]] = []
    for index, block in blocks:
        described = _Block(block, index, _values(block))
        kind = next((each for each in kinds if described.is_like(each[0])), [])
        if not kind:
            kinds.append(kind)
        kind.append(described)
    return [[described.block for described in kind] for kind in kinds]


class _Block(NamedTuple):
    """A block, its position among the children of its parent, and values that are the same in a block that is like it.

    The names of modules, and a number that is the position, may differ.
    """

    block: nn.Module
    place: int
    values: list[Any]

    def is_like(self, other: "_Block") -> bool:
        if len(self.values) != len(other.values):
            return False
        pairs = zip(self.values, other.values, strict=True)
        return all(own == its or (own, its) == (self.place, other.place) for own, its in pairs)


class _RepeatedForward(InstanceMethod):
    """The forward method of a block, unless one before it had like inputs."""

    def __init__(self, recomputed: RecomputedForward, outputs: dict[Any, Any]) -> None:
        super().__init__(recomputed.module)
        self.recomputed = recomputed
        self.before = recomputed.before
        self.outputs = outputs  # of this kind: what inputs are like -> what the output is like
        self.first: set[Any] = set()  # what inputs are like that this block was the first to get

    def call(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not inputs:  # in an object of the user's class
            return self.original(*args, **kwargs)
        key = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in inputs)
        if key in self.first or key not in self.outputs or not any(tensor.requires_grad for tensor in inputs):
            self.first.add(key)
            storage = inputs[0].untyped_storage()._cdata
            saved: list[bool] = []  # one for each time that a graph saves the first input
            with watch_saved_tensors(lambda x: saved.extend([True] * (x.untyped_storage()._cdata == storage))):
                output = self.original(*args, **kwargs)
            leaves, structure = tree_flatten(output)
            self.outputs[key] = [_described(leaf, inputs) for leaf in leaves], structure, self.module, saved
            return output
        leaves, structure, like, saved = self.outputs[key]
        budget = self.recomputed.budget
        kept = None
        if budget is not None and budget.keeps and not is_in_backward_pass():
            kept = budget.size_of(like), bool(saved)
        made = [leaf for leaf in leaves if isinstance(leaf, _Made)]
        trained = (parameter for parameter in self.module.parameters() if parameter.requires_grad)
        tensors = iter(_Skipped.apply(made, kept, *inputs, *trained))  # type: ignore[no-untyped-call]
        values = [next(tensors) if isinstance(leaf, _Made) else leaf for leaf in leaves]
        values = [inputs[leaf.position] if isinstance(leaf, _Input) else leaf for leaf in values]
        return tree_unflatten(values, structure)


class _Made(NamedTuple):
    """A tensor that a block made."""

    shape: torch.Size
    dtype: torch.dtype


class _Input(NamedTuple):
    """A tensor that a block got and returns."""

    position: int


def _described(leaf: Any, inputs: list[Tensor]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    position = next((number for number, tensor in enumerate(inputs) if tensor is leaf), None)
    return _Made(leaf.shape, leaf.dtype) if position is None else _Input(position)


class _Skipped(torch.autograd.Function):
    """Inputs of a block, and what trains in it -> outputs; they and the gradients have no values.

    `kept`: the bytes that the block keeps, and whether it keeps its first input; None: it is recomputed.
    """

    @staticmethod
    def forward(ctx: Any, outputs: list[_Made], kept: tuple[int, bool] | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        nbytes, saves_input = kept or (0, True)
        x = inputs[0] if saves_input else inputs[0].new_empty(0)
        ctx.save_for_backward(x, inputs[0].new_empty(nbytes, dtype=torch.uint8))
        ctx.inputs = [(tensor.shape, tensor.dtype) for tensor in inputs]
        return tuple(inputs[0].new_empty(shape, dtype=dtype) for shape, dtype in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, _ = ctx.saved_tensors
        needed = zip(ctx.inputs, ctx.needs_input_grad[2:], strict=True)
        gradients = (x.new_empty(shape, dtype=dtype) if is_needed else None for (shape, dtype), is_needed in needed)
        return None, None, *gradients


def _values(block: nn.Module) -> list[Any]:
    values: list[Any] = []
    for name, part in block.named_modules():
        tensors = [*part._parameters.items(), *part._buffers.items()]
        values += [name, type(part), *(getattr(part, hooks) for hooks in HOOKS)]
        for key, value in sorted(vars(part).items()):
            if isinstance(value, PLAIN):
                values += [key, group(value) if isinstance(value, str) else value]
        values += [(key, t.shape, t.dtype, t.requires_grad) for key, t in tensors if t is not None]
    return values
