"""The forward pass of transformers' experts in 4 bits: each expert that tokens reached runs once, on its tokens."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.layers.readable_stack import SUFFIX


def routed_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of transformers' experts, expert by expert over the tokens that chose it.

    The same as `grouped_mm_experts_forward` (transformers/integrations/moe.py), with one host synchronization for the
    number of tokens of each expert.

    Args:
        self: A module that transformers' `use_experts_implementation` decorated, its stacks in 4 bits.
        hidden_states: [tokens, hidden].
        top_k_index: The experts of each token, [tokens, k]; a number beyond the experts means none.
        top_k_weights: Their weights, [tokens, k].
    """
    tokens, k = top_k_index.shape
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = _weights_of(self, up_name), _weights_of(self, "down_proj")
    counts = _tokens_of_experts(ids, len(up))
    reached = sum(counts)
    rows = hidden_states[order[:reached] // k]
    outputs = []
    for number, part in enumerate(torch.split(rows, counts)):
        if not len(part):
            continue
        hidden = _product(self, up[number], part, f"{up_name}_bias", number)
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        hidden = _product(self, down[number], hidden, "down_proj_bias", number)
        outputs.append(self.post_expert_norm(hidden) if self.has_post_expert_norm else hidden)
    if not outputs:
        return torch.zeros_like(hidden_states)
    weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order[:reached], None]
    result = weighted.new_zeros(tokens * k, weighted.shape[1]).index_copy(0, order[:reached], weighted)
    return result.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def _tokens_of_experts(ids: Tensor, experts: int) -> list[int]:
    if isinstance(ids, FakeTensor):  # the memory planner runs models on tensors without data: one expert gets all
        return [len(ids)] + [0] * (experts - 1)
    counts: list[int] = torch.bincount(ids, minlength=experts)[:experts].tolist()
    return counts


def _weights_of(owner: Any, key: str) -> Any:
    """The experts of a stack: layers in 4 bits, or the matrices of a dense parameter."""
    stack = owner._modules.get(key + SUFFIX)
    return getattr(owner, key) if stack is None else stack.layers


def _product(owner: Any, weight: Any, x: Tensor, bias_name: str, number: int) -> Tensor:
    if isinstance(weight, QLoRALinear):
        y: Tensor = weight(x)
    else:
        y = x @ weight if owner.is_transposed else nn.functional.linear(x, weight)
    return y + getattr(owner, bias_name)[number] if owner.has_bias else y


def is_routed(kind: type[nn.Module]) -> bool:
    """Whether transformers' decorator `use_experts_implementation` made this class's forward."""
    return hasattr(kind, "_apply_gate") and "experts_interface" in kind.forward.__code__.co_freevars
