"""The layers of a stack of experts as `grouped_linear` takes them, checked again only if a tensor was replaced."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_qlora.kernels.grouped_linear import can_group, is_plain_call
from lightning_qlora.kernels.lora_linear import PLAIN
from lightning_qlora.layers.lora_layer import DISABLED
from lightning_qlora.layers.packed_linear import BASE
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.quantization.packed_weight import PackedBytes

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class ExpertGroup(NamedTuple):
    """The layers of all experts of a stack, and their tensors."""

    layers: Sequence[QLoRALinear]
    weights: list[PackedBytes]
    lora_a: list[Tensor]
    lora_b: list[Tensor]

    def without_adapters(self) -> "ExpertGroup":
        """The same with adapters of rank 1 that are zero."""
        (_, columns), (rows, _), like = self.lora_a[0].shape, self.lora_b[0].shape, self.lora_a[0]
        a, b = (_zeros(*shape, like.dtype, like.device) for shape in ((1, columns), (rows, 1)))
        return self._replace(lora_a=[a] * len(self.layers), lora_b=[b] * len(self.layers))


@cache
def _zeros(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept, so that the table of addresses in a kernel stays the same. Not of inference mode: autograd saves it."""
    with torch.inference_mode(False):
        return torch.zeros(rows, columns, dtype=dtype, device=device)


class _Checked(NamedTuple):
    """A group, or None for layers that can't be one, and what that depends on."""

    key: list[Any]
    tensors: list[Tensor]  # kept, so that no other tensor gets the id of one of them
    group: ExpertGroup | None


_checked: WeakKeyDictionary[nn.Module, _Checked] = WeakKeyDictionary()


def expert_group(stack: Any, x: Tensor) -> ExpertGroup | None:
    """The experts of a `QLoRAExperts` if one call of `grouped_linear` can compute all of them on x, else None."""
    layers: list[QLoRALinear] = stack.layers
    own = [vars(layer) for layer in layers]
    held: list[dict[str, Tensor]] = [of["_parameters"] for of in own]
    scalings, disabled = {of["scaling"] for of in own}, sum(DISABLED in of for of in own)
    if not is_plain_call(x, held[0]["lora_A"]) or len(scalings) > 1 or not all(map(_is_plain, own)):
        return None
    if disabled not in (0, len(own)):
        return None
    lora_a, lora_b = [of["lora_A"] for of in held], [of["lora_B"] for of in held]
    tensors = [*(of[name] for name in BASE for of in held), *lora_a, *lora_b]
    with PLAIN():
        key = [x.device, *map(id, tensors), *map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors)]
        found = _checked.get(stack)
        if found is None or found.key != key:
            weights = [layer.weight_bytes for layer in layers]
            group = ExpertGroup(layers, weights, lora_a, lora_b) if can_group(x, weights, lora_a, lora_b) else None
            found = _checked[stack] = _Checked(key, tensors, group)
    return found.group.without_adapters() if disabled and found.group else found.group


def _is_plain(own: dict[str, Any]) -> bool:
    """Whether nothing but the layer's op is to run: no DoRA, no hook (as a calibration registers), no other forward."""
    has_hook = any(map(own.get, HOOKS))
    return not has_hook and own["_parameters"]["lora_magnitude_vector"] is None and "forward" not in own
