"""Which parameters are stacks of experts, and which linear layers are routers to experts.

A stack is recognized by the number of experts that its module knows, so no list of architectures is needed.
"""

from collections.abc import Mapping
from functools import cache
from itertools import islice
from typing import Any

from torch import Tensor, nn

from lightning_qlora.experts.experts import ExpertParameter, QLoRAExperts
from lightning_qlora.layers.kinds import sizes_of
from lightning_qlora.layers.names import last_part, owner_name, parameter_name, stack_of
from lightning_qlora.tensors.values import is_strided

ROUTERS = ("gate", "router")  # names of routers beside a module `experts`
COUNTS = ("num_experts", "num_local_experts", "moe_num_experts", "n_routed_experts")  # attributes of modules
DOWN = ("down", "w2")  # in the names of projections from the experts' width to the model's


def expert_parameters(owner: nn.Module) -> list[ExpertParameter]:
    """The stacks that a module holds itself, without those of an earlier conversion.

    A stack is [experts, out, in] or [experts, in, out], where an attribute of the module whose name contains "experts"
    is that number; or flat, [experts * width, in], where two attributes are these numbers (DBRX).
    """
    stacks = [
        ExpertParameter(owner, parameter_name(key), len(part), part._transposed)
        for key, part in owner._modules.items()
        if isinstance(part, QLoRAExperts) and part.is_unfinished
    ]
    if isinstance(owner, nn.Linear):
        return stacks
    for key, parameter in owner._parameters.items():
        if parameter is None or not is_strided(parameter):
            continue
        count = _number_of_experts(owner, parameter)
        if count is not None:
            stacks.append(ExpertParameter(owner, key, count, _is_transposed(owner, key, parameter, count)))
    return stacks


def expert_parameter(owner: nn.Module, key: str) -> ExpertParameter | None:
    """The stack of this name, converted or not."""
    experts = stack_of(owner, key)
    if experts is not None:
        return ExpertParameter(owner, key, len(experts), experts._transposed)
    return next((part for part in expert_parameters(owner) if part.key == key), None)


def _number_of_experts(owner: nn.Module, parameter: Tensor) -> int | None:
    numbers = {key: value for key, value in vars(owner).items() if type(value) is int and value > 0}
    if parameter.ndim == 3:
        experts = {value for key, value in numbers.items() if "experts" in key and "per_tok" not in key}
        return parameter.shape[0] if parameter.shape[0] in experts else None
    if parameter.ndim == 2:
        widths = {value for key, value in numbers.items() if key.endswith(("_size", "_dim")) and value > 1}
        counts = [numbers[key] for key in COUNTS if key in numbers]
        return next((count for count in counts if parameter.shape[0] in {count * width for width in widths}), None)
    return None


def _is_transposed(owner: Any, key: str, parameter: Tensor, experts: int) -> bool:
    """Whether one expert is [in, out]: transformers' decorator says it, else the width of the model does.

    A wrong answer would cost speed and memory, not correctness.
    """
    if isinstance(getattr(owner, "is_transposed", None), bool):
        return bool(owner.is_transposed)
    hidden = getattr(owner, "hidden_size", getattr(owner, "hidden_dim", None))
    pairs = {key: (parameter.numel() // experts // parameter.shape[-1], parameter.shape[-1])}
    if pairs[key][0] == pairs[key][1]:  # then the other stacks of the module decide
        pairs = {k: (p.shape[1], p.shape[2]) for k, p in owner._parameters.items() if p is not None and p.ndim == 3}
    for name, (rows, columns) in pairs.items():
        inputs = rows
        if any(word in name for word in DOWN):
            inputs = columns
        if rows != columns and hidden == inputs:
            return True
    return False


class Routers:
    """Which linear layers of a module are routers; each block is searched once."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules  # all, by name
        self._experts = cache(lambda name: _experts_in(modules[name]))
        self._holds_one = cache(lambda name: _holds_one_linear(modules[name]))

    def has(self, name: str, layer: nn.Module) -> bool:
        """Whether a linear layer has the name of one, or its outputs are the experts of the block around it.

        The block is the module that holds the layer, or the one around that if the layer is its only linear layer, as
        in most router classes.
        """
        if not name:
            return False
        outputs = sizes_of(layer)[0]
        outer = owner_name(name)
        if last_part(name) in ROUTERS and hasattr(self._modules[outer], "experts"):
            return True
        if outputs in self._experts(outer):
            return True
        return bool(outer) and self._holds_one(outer) and outputs in self._experts(owner_name(outer))


def _holds_one_linear(block: nn.Module) -> bool:
    layers = (part for part in block.modules() if isinstance(part, nn.Linear))
    return len(list(islice(layers, 2))) == 1


def _experts_in(block: nn.Module) -> set[int]:
    """The numbers of experts in a block: as its attributes say, and as its children hold."""
    parts = [block, *(part for child in block.children() for part in (child, *child.children()))]
    counts = {value for part in parts for key in COUNTS if type(value := getattr(part, key, None)) is int}
    lists = (child for name, child in block.named_children() if "expert" in name)
    counts |= {len(child) for child in lists if isinstance(child, (nn.ModuleList, nn.ModuleDict))}
    return counts - {1}
