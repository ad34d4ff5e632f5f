"""All ranks of a data-parallel run hold the same 4-bit weights: DDP sends parameters, and these are none."""

from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.tensors.dtensor import of_all_ranks, world_size


def check_same_base(module: nn.Module) -> None:
    """ValueError on all ranks, which must call it, if they hold different 4-bit weights."""
    names = _differing(_base(module))
    if names:
        raise ValueError(
            f"{names[0]}: the ranks hold different 4-bit weights there, and in {len(names)} layers together. Load the "
            "same model on all ranks, or call seed_everything before it is built."
        )


def use_base_of_rank_0(module: nn.Module, group: Any = None) -> None:
    """Let all ranks of a group, None: all, hold the 4-bit weights of its rank 0; all of them must call it."""
    layers = _base(module)
    for name in _differing(layers, group):
        layer = layers[name]
        values: list[Any] = [layer.packed_weights, layer.initial]
        dist.broadcast_object_list(values, group=group, group_src=0)
        weights, initial = values
        if dist.get_rank(group) > 0:
            layer.set_packed_weights([weight.to(layer.packed.device) for weight in weights])
            layer.set_initial(initial)
            if layer.input_observer is not None:
                layer.input_observer.leave_to_another_rank()


def _base(module: nn.Module) -> dict[str, LoRALayer]:
    return {name: layer for name, layer in adapted_layers(module).items() if "packed" in vars(layer)}


def _differing(layers: dict[str, LoRALayer], group: Any = None) -> list[str]:
    if world_size(group) == 1:
        return []
    of_ranks = of_all_ranks({name: layer.base_fingerprint() for name, layer in layers.items()}, group)
    names = sorted({name for of_rank in of_ranks for name in of_rank})
    return [name for name in names if len({of_rank.get(name) for of_rank in of_ranks}) > 1]
