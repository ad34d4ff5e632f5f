"""Which modules compute each row of their input by itself, found by what they do.

A module is called with random rows: a tile from the middle, at an odd place, must have the values that it has alone,
and keep them where all other rows are NaN. (The first tile alone would let causal attention pass; and 0 * NaN is NaN,
so a way between rows whose weights begin with 0 is found too.) A stand-in takes the place of each 4-bit layer, so that
a model without data, as `plan` has it, gets the same answer.
"""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks

from lightning_qlora.activations import patches
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.tensors.values import has_values

ROWS = 64  # of the tile; the input has three times as many
TILE = slice(ROWS + 1, 2 * ROWS + 1)
ERROR = 8  # of the tile's values, in units of the last bit of the largest


class NotRowByRow(Exception):
    """Why a module does not compute each row by itself, or is not known to."""


class StandIn:
    """What a 4-bit layer computes during an examination: the mean of each row of its input, times fixed numbers."""

    def __init__(self, layer: LoRALayer) -> None:
        self.layer = layer
        self.rows: list[int] = []  # of each call
        self.values = 0  # of all outputs

    def __call__(self, x: Tensor, *_: Tensor) -> Tensor:
        factors = torch.linspace(1, 2, self.layer.out_features, device=x.device, dtype=torch.float32)
        y = (x.float().mean(-1, keepdim=True) * factors).to(x.dtype)
        self.rows.append(y[..., 0].numel())
        self.values += y.numel()
        return y


def values_per_input(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """How many values the 4-bit layers of a module compute for each value of an input like x [..., rows, width].

    `forward` is what is called, and `module` what is called by it.

    Raises:
        NotRowByRow: If the module does not compute each row by itself.
    """
    stand_ins = [StandIn(layer) for layer in module.modules() if isinstance(layer, LoRALayer)]
    has_data = has_values(x)
    with ExitStack() as stack:
        if not has_data:
            stack.enter_context(unset_fake_temporarily())
        # Else activation checkpointing would count what is saved here, and not find it when it recomputes.
        stack.enter_context(saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
        stack.enter_context(torch.random.fork_rng([x.device] if x.is_cuda else []))
        stand_in_of = {each.layer: each for each in stand_ins}
        changed = stack.enter_context(patches.examined(module, stand_in_of, has_data))
        shape = [*[1] * (x.ndim - 2), 3 * ROWS, x.shape[-1]]
        generator = torch.Generator("cpu").manual_seed(0)
        every = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        every = every.to(x.device if has_data else "cpu", x.dtype)
        tile = every[..., TILE, :].clone()
        among_nan = torch.full_like(every, torch.nan)
        among_nan[..., TILE, :] = tile
        outputs = [_output(module, forward, value, stand_ins) for value in (every, among_nan, tile)]
    if changed:
        raise NotRowByRow(f"{type(changed[0]).__name__} keeps values")
    expected, among = (value[..., TILE, :] for value in outputs[:2])
    error = ERROR * torch.finfo(expected.dtype).eps * expected.abs().amax()
    if not all((value - expected).abs().amax() <= error for value in (among, outputs[2])):
        raise NotRowByRow("it mixes tokens")
    return sum(stand_in.values for stand_in in stand_ins) / (every.numel() + among_nan.numel() + tile.numel())


def _output(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, stand_ins: list[StandIn]) -> Tensor:
    known = {id(parameter) for parameter in module.parameters()}
    for stand_in in stand_ins:
        stand_in.rows.clear()
    try:
        with torch.enable_grad():
            y = forward(x)
    except Exception as error:  # any error of the module's own code
        raise NotRowByRow(f"it does not take {ROWS} tokens alone ({type(error).__name__})") from error
    if not isinstance(y, Tensor) or y.shape[:-1] != x.shape[:-1] or not y.is_floating_point():
        raise NotRowByRow("its output is not one row for each row of its input")
    rows = x[..., 0].numel()
    for stand_in in stand_ins:
        if not stand_in.rows or (min(stand_in.rows) < rows and len(stand_in.layer._shape) == 2):
            raise NotRowByRow("not all of its layers see all tokens")
    if not {id(leaf) for leaf in _leaves(y)} <= known:
        raise NotRowByRow("it uses parameters of other modules")
    return y.detach().float()


def _leaves(y: Tensor) -> list[Tensor]:
    """The tensors that a gradient of y would be added to."""
    nodes = [y.grad_fn]
    seen = set()
    leaves = [] if y.grad_fn is not None or not y.requires_grad else [y]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes += [each for each, _ in node.next_functions]
    return leaves
