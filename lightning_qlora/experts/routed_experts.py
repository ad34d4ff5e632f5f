"""The forward pass of transformers' experts, on rows of tokens sorted by expert."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.layers.names import stack_of
from lightning_qlora.tensors.values import has_values


def routed_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of transformers' experts.

    The same as `grouped_mm_experts_forward` (transformers/integrations/moe.py). Hidden states are [tokens, hidden], the
    experts of each token and their weights [tokens, k]; a number beyond the experts means none.
    """
    tokens, k = top_k_index.shape
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    experts = len(self.down_proj)
    ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    if self.has_gate:
        key = "gate_up_proj"
        activate = self._apply_gate
    else:
        key = "up_proj"
        activate = self.act_fn
    hidden = activate(_product(self, key, hidden_states[order // k], ends, ids))
    outputs = _product(self, "down_proj", hidden, ends, ids)
    if getattr(self, "has_post_expert_norm", False):  # transformers before 5.20 does not have this flag
        outputs = self.post_expert_norm(outputs)
    weighted = outputs * (top_k_weights.reshape(-1)[order] * (ids < experts))[:, None]
    result = weighted.new_zeros(tokens * k, weighted.shape[1]).index_copy(0, order, weighted)
    return result.view(tokens, k, weighted.shape[1]).sum(dim=1).to(hidden_states.dtype)


def _product(owner: Any, key: str, x: Tensor, ends: Tensor, ids: Tensor) -> Tensor:
    stack = stack_of(owner, key)
    if stack is None:
        y = _dense_product(owner, getattr(owner, key), x, ends)
    else:
        y = stack(x, ends)
    if owner.has_bias:
        y = y + getattr(owner, f"{key}_bias")[ids.clamp(max=len(ends) - 1)]
    return y


def _dense_product(owner: Any, stack: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    numbers, parts = rows_of_experts(x, ends)
    if owner.is_transposed:
        stack = stack.mT
    weights = stack.unbind()
    outputs = [nn.functional.linear(rows, weights[number]) for number, rows in zip(numbers, parts, strict=True)]
    return join_rows(outputs, x, len(weights[0]))


def rows_of_experts(x: Tensor, ends: Tensor) -> tuple[list[int], Sequence[Tensor]]:
    """The experts that rows end at, and their rows; the host waits for the numbers of rows."""
    counts = [len(x)]
    if has_values(ends):  # without data, as the memory planner runs models, one expert gets all
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    numbers = [number for number, count in enumerate(counts) if count]
    sizes = [counts[number] for number in numbers]
    return numbers, torch.split(x[: sum(sizes)], sizes)


def join_rows(outputs: list[Tensor], x: Tensor, width: int) -> Tensor:
    """The outputs of all rows of x, [rows, width]: zeros from the last end on."""
    rest = len(x) - sum(map(len, outputs))
    if rest or not outputs:
        outputs.append(x.new_zeros(rest, width))
    return torch.cat(outputs)


def is_routed(kind: type[nn.Module]) -> bool:
    """Whether transformers' decorator `use_experts_implementation` made this class's forward."""
    return hasattr(kind, "_apply_gate") and "experts_interface" in kind.forward.__code__.co_freevars
