"""The forward pass of transformers' experts in 4 bits, on rows of tokens sorted by expert.

On a GPU all experts run in a few launches, and the host does not wait for the number of rows of each of them
(`grouped_linear`). Elsewhere, and where that does not support the layers, each expert that tokens reached runs once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from lightning_qlora.kernels.backends import INTERPRETED
from lightning_qlora.kernels.grouped_linear import can_group, grouped_linear
from lightning_qlora.kernels.lora_linear import is_eager
from lightning_qlora.kernels.ops import has_autocast
from lightning_qlora.layers.lora_layer import DISABLED
from lightning_qlora.layers.names import stack_name
from lightning_qlora.layers.packed_linear import BASE
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.quantization.packed_weight import PackedBytes

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def routed_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of transformers' experts.

    The same as `grouped_mm_experts_forward` (transformers/integrations/moe.py). Expert by expert there is one host
    synchronization, for the number of tokens of each expert. Hidden states are [tokens, hidden], the experts of each
    token and their weights [tokens, k]; a number beyond the experts means none.
    """
    tokens, k = top_k_index.shape
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    keys = ("gate_up_proj" if self.has_gate else "up_proj"), "down_proj"
    # The experts of a stack are a `QLoRAExperts`, or the matrices of a dense parameter.
    stacks: dict[str, Any] = {key: self._modules.get(stack_name(key)) or getattr(self, key) for key in keys}
    experts = len(stacks["down_proj"])
    if groups := _grouped(stacks, hidden_states):
        ends = torch.searchsorted(ids, torch.arange(experts, device=ids.device), right=True, out_int32=True)
        product = partial(_product_of_all, self, groups, ends, ids.clamp(max=experts - 1))
        outputs = _feed_forward(self, keys, hidden_states[order // k], product)
        weights = top_k_weights.reshape(-1)[order] * (ids < experts)
    else:
        counts: list[int] = [len(ids)] + [0] * (experts - 1)
        if not isinstance(ids, FakeTensor):  # without data, as the memory planner runs models, one expert gets all
            counts = torch.bincount(ids, minlength=experts)[:experts].tolist()
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


def _product_of_one(owner: Any, stacks: dict[str, Any], number: int, key: str, x: Tensor) -> Tensor:
    weight = stacks[key][number]
    if isinstance(weight, QLoRALinear):
        y: Tensor = weight(x)
    else:
        y = x @ weight if owner.is_transposed else nn.functional.linear(x, weight)
    return y + getattr(owner, f"{key}_bias")[number] if owner.has_bias else y


class ExpertGroup(NamedTuple):
    """The layers of all experts of a stack, and their tensors."""

    layers: Sequence[QLoRALinear]
    weights: list[PackedBytes]
    lora_a: list[Tensor]
    lora_b: list[Tensor]


# Stack -> what its group was made from, the tensors (kept, so that no others get their ids), and the group, if any.
_checked: WeakKeyDictionary[nn.Module, tuple[list[Any], list[Tensor], ExpertGroup | None]] = WeakKeyDictionary()


def expert_group(stack: Any, x: Tensor) -> ExpertGroup | None:
    """The experts of a `QLoRAExperts` if one call of `grouped_linear` can compute all of them on x, else None."""
    layers: list[QLoRALinear] = stack.layers
    own = [vars(layer) for layer in layers]
    held: list[dict[str, Tensor]] = [of["_parameters"] for of in own]
    kinds = {(of["scaling"], DISABLED in of) for of in own}
    if not is_eager(x, held[0]["lora_A"]) or len(kinds) > 1 or not all(map(_is_plain, own)):
        return None
    lora_a, lora_b = [of["lora_A"] for of in held], [of["lora_B"] for of in held]
    tensors = [*(getattr(layer, name) for name in BASE for layer in layers), *lora_a, *lora_b]
    key = [x.device, *map(id, tensors), *map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors)]
    known, _, group = _checked.get(stack, (None, None, None))
    if known != key:
        weights = [layer.weight_bytes for layer in layers]
        group = ExpertGroup(layers, weights, lora_a, lora_b) if can_group(x, weights, lora_a, lora_b) else None
        _checked[stack] = key, tensors, group
    return group


def _is_plain(own: dict[str, Any]) -> bool:
    """Whether nothing but the layer's op is to run: no DoRA, no hook (as a calibration registers), no other forward."""
    has_hook = any(map(own.get, HOOKS))
    return not has_hook and own["_parameters"]["lora_magnitude_vector"] is None and "forward" not in own


def _grouped(stacks: dict[str, Any], x: Tensor) -> dict[str, Any] | None:
    """The stacks as `grouped_linear` takes them; None if it can't compute one of them."""
    if torch.compiler.is_compiling() or not (INTERPRETED or x.is_cuda):
        return None
    groups = {key: None if isinstance(stack, Tensor) else expert_group(stack, x) for key, stack in stacks.items()}
    return groups if all(groups.values()) else None


def _product_of_all(
    owner: Any, groups: dict[str, ExpertGroup], ends: Tensor, ids: Tensor, key: str, x: Tensor
) -> Tensor:
    (layers, weights, lora_a, lora_b), seed = groups[key], None
    first = layers[0]
    dtype, scaling = first.compute_dtype(x), first.scaling
    if first._qlora_disabled:
        lora_a, lora_b, scaling = [a.detach() for a in lora_a], [b.detach() for b in lora_b], 0.0
    elif first.lora_dropout and first.training:
        seed = torch.randint(1 << 62, (1,), device="cpu")  # drawn again when checkpointing recomputes
    y = grouped_linear(x.to(dtype), ends, weights, lora_a, lora_b, scaling, first.lora_dropout, seed)
    y = y if has_autocast(x.device.type) else y.to(x.dtype)
    return y + getattr(owner, f"{key}_bias")[ids] if owner.has_bias else y


def is_routed(kind: type[nn.Module]) -> bool:
    """Whether transformers' decorator `use_experts_implementation` made this class's forward."""
    return hasattr(kind, "_apply_gate") and "experts_interface" in kind.forward.__code__.co_freevars
