"""Attention of transformers' models that conversion holds in fp32 for a card without bf16, computed in fp16.

`kernels/half_attention.py` says how. Of few queries, as in generation, it stays in fp32: it reads keys and values once,
and a cast reads them too.
"""

from collections.abc import Callable
from math import ceil, inf
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.dtypes.compute_in import ComputeIn, takes_halves
from lightning_qlora.dtypes.instance_method import instance_method
from lightning_qlora.kernels.half_attention import attention_in_half
from lightning_qlora.layers.packed_layer import PackedLayer

MANY = 16  # queries
LEAST = torch.finfo(torch.float16).min
ADDED = ("attention_mask", "position_bias")  # to scores


def attend(
    original: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    *others: Any, **options: Any,
) -> Any:  # fmt: skip
    """In place of `original`, transformers' "sdpa" attention of a module: [batch, queries, heads, width], and None."""
    named = {**options, "attention_mask": attention_mask}
    added = {name: named[name] for name in ADDED if isinstance(named.get(name), Tensor)}
    scale = options.get("scaling")
    dropout = options.get("dropout", 0.0)
    fits = not others and (scale is None or scale > 0) and dropout < 1 and min(map(Tensor.numel, (query, key, value)))
    if not fits or not _is_in_half(module, query) or any(tensor.requires_grad for tensor in added.values()):
        return original(module, query, key, value, attention_mask, *others, **options)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    named |= {name: _added_in_half(tensor) for name, tensor in added.items()}
    named["scaling"] = scale
    groups = query.shape[1] // key.shape[1]  # heads that share a key, which the fused attention of these cards lacks
    caller = SimpleNamespace(is_causal=getattr(module, "is_causal", True))

    def attend_16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if groups > 1:
            k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
        y: Tensor = original(caller, q, k, v, **named)[0]
        return y

    sums = ceil(groups * query.shape[-2] / (1 - dropout))
    return attention_in_half(attend_16, query, key, value, scale, sums), None


def _added_in_half(added: Tensor) -> Tensor:
    """What is added to scores, less the largest of its row: probabilities stay, and fp16 is fine near zero."""
    if not added.is_floating_point():
        return added
    largest = added.amax(-1, keepdim=True).clamp(min=torch.finfo(added.dtype).min)
    half = (added - largest).clamp(min=LEAST).to(torch.float16)
    return half.masked_fill(added == -inf, -inf)


def _is_in_half(module: nn.Module, query: Tensor) -> bool:
    return takes_halves(query) and query.shape[-2] >= MANY and any(map(_is_held, module._modules.values()))


def _is_held(part: nn.Module | None) -> bool:
    """Whether a layer has another type than before in fp32, by conversion."""
    if part is None or isinstance(part, PackedLayer):
        return part is not None and part.is_held
    method = instance_method(part, ComputeIn)
    return method is not None and method.held is torch.float32
