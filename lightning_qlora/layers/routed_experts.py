"""The forward pass of transformers' experts in 4 bits, on rows of tokens sorted by expert.

On a GPU all experts run in a few launches, and the host does not wait for the number of rows of each of them
(`grouped_linear`). Elsewhere, and where that does not support the layers, each expert that tokens reached runs once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_qlora.kernels.backends import INTERPRETED
from lightning_qlora.kernels.grouped_linear import grouped_linear
from lightning_qlora.kernels.ops import has_autocast
from lightning_qlora.layers.dotted_names import stack_name
from lightning_qlora.layers.expert_group import ExpertGroup, expert_group
from lightning_qlora.layers.qlora_linear import QLoRALinear


def routed_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of transformers' experts.

    The same as `grouped_mm_experts_forward` (transformers/integrations/moe.py). Expert by expert there is one host
    synchronization, for the number of tokens of each expert. Hidden states are [tokens, hidden], the experts of each
    token and their weights [tokens, k]; a number beyond the experts means none.
    """
    tokens, k = top_k_index.shape
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    keys = ("gate_up_proj" if self.has_gate else "up_proj"), "down_proj"
    stacks = {key: _weights_of(self, key) for key in keys}
    experts = len(stacks["down_proj"])
    if groups := _grouped(stacks, hidden_states):
        ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True, out_int32=True)
        product = partial(_product_of_all, self, groups, ends, ids.clamp(max=experts - 1))
        outputs = _feed_forward(self, keys, hidden_states[order // k], product)
        weights = top_k_weights.reshape(-1)[order] * (ids < experts)
    else:
        counts = _tokens_of_experts(ids, experts)
        order = order[: sum(counts)]
        parts = enumerate(torch.split(hidden_states[order // k], counts))
        made = [
            _feed_forward(self, keys, part, partial(_product_of_one, self, stacks, number))
            for number, part in parts
            if len(part)
        ]
        if not made:
            return torch.zeros_like(hidden_states)
        outputs, weights = torch.cat(made), top_k_weights.reshape(-1)[order]
    weighted = outputs * weights[:, None]
    result = weighted.new_zeros(tokens * k, weighted.shape[1]).index_copy(0, order, weighted)
    return result.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def _feed_forward(owner: Any, keys: tuple[str, str], x: Tensor, product: Callable[[str, Tensor], Tensor]) -> Tensor:
    """The feed-forward layer of experts, with a function that multiplies by the weight of a parameter."""
    hidden = product(keys[0], x)
    hidden = owner._apply_gate(hidden) if owner.has_gate else owner.act_fn(hidden)
    y: Tensor = product(keys[1], hidden)
    # transformers before 5.20 does not have this flag.
    return owner.post_expert_norm(y) if getattr(owner, "has_post_expert_norm", False) else y


def _tokens_of_experts(ids: Tensor, experts: int) -> list[int]:
    if isinstance(ids, FakeTensor):  # the memory planner runs models on tensors without data: one expert gets all
        return [len(ids)] + [0] * (experts - 1)
    counts: list[int] = torch.bincount(ids, minlength=experts)[:experts].tolist()
    return counts


def _weights_of(owner: Any, key: str) -> Any:
    """The experts of a stack: a `QLoRAExperts`, or the matrices of a dense parameter."""
    stack = owner._modules.get(stack_name(key))
    return getattr(owner, key) if stack is None else stack


def _product_of_one(owner: Any, stacks: dict[str, Any], number: int, key: str, x: Tensor) -> Tensor:
    weight = stacks[key][number]
    if isinstance(weight, QLoRALinear):
        y: Tensor = weight(x)
    else:
        y = x @ weight if owner.is_transposed else nn.functional.linear(x, weight)
    return y + getattr(owner, f"{key}_bias")[number] if owner.has_bias else y


def _grouped(stacks: dict[str, Any], x: Tensor) -> dict[str, Any] | None:
    """The stacks as `grouped_linear` takes them; None if it can't compute one of them."""
    if torch.compiler.is_compiling() or not (INTERPRETED or x.is_cuda):
        return None
    groups = {key: None if isinstance(stack, Tensor) else expert_group(stack, x) for key, stack in stacks.items()}
    return groups if all(groups.values()) else None


def _product_of_all(
    owner: Any, groups: dict[str, ExpertGroup], ends: Tensor, ids: Tensor, key: str, x: Tensor
) -> Tensor:
    group, seed = groups[key], None
    first = group.layers[0]
    dtype = first.compute_dtype(x)
    if first.lora_dropout and first.training:
        seed = torch.randint(1 << 62, (1,), device="cpu")  # drawn again when checkpointing recomputes
    tensors = group.weights, group.lora_a, group.lora_b
    y = grouped_linear(x.to(dtype), ends, *tensors, first.scaling, first.lora_dropout, seed)
    y = y if has_autocast(x.device.type) else y.to(x.dtype)
    return y + getattr(owner, f"{key}_bias")[ids] if owner.has_bias else y


def is_routed(kind: type[nn.Module]) -> bool:
    """Whether transformers' decorator `use_experts_implementation` made this class's forward."""
    return hasattr(kind, "_apply_gate") and "experts_interface" in kind.forward.__code__.co_freevars
