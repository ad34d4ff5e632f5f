"""All ranks hold the base of rank 0: its 4-bit weights, and what else conversion froze.

DDP sends parameters, but after a checkpoint was restored, and the fingerprints in it are those of rank 0.
"""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_qlora.checks import first_of
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.survey.records import Frozen, frozen_parameters, replace_record
from lightning_qlora.tensors.dtensor import is_sharded, of_all_ranks, world_size


def use_base_of_rank_0(module: nn.Module, group: Any = None) -> None:
    """Let all ranks of a group, None: all, hold the frozen values of its rank 0. All of them must call it.

    They differ where ranks built their modules from other random numbers, or where rank 0 alone loaded a file. What was
    computed from the float weight is that of rank 0 too.
    """
    if world_size(group) == 1:
        return
    layers = {name: layer for name, layer in adapted_layers(module).items() if "packed" in vars(layer)}
    if not layers:
        return
    frozen = {each.name: each for each in frozen_parameters(module.named_modules()) if not is_sharded(each.parameter)}
    fingerprints = {name: layer.base_fingerprint() for name, layer in layers.items()}
    recorded = {name: each.record.fingerprint for name, each in frozen.items()}
    for name in _differing(fingerprints, group):
        _send_weight(layers[name], group)
    for name in _differing(recorded, group):
        _send_parameter(frozen[name], group)


def _differing(numbers: Mapping[str, int | None], group: Any) -> list[str]:
    """Names whose numbers differ between ranks; ValueError if the names do."""
    of_ranks = of_all_ranks(dict(numbers), group)
    for rank, other in enumerate(of_ranks):
        names = other.keys() ^ of_ranks[0].keys()
        if names:
            raise ValueError(
                f"Rank {rank} and rank 0 froze different parts of the module: {first_of(sorted(names), 3)}. What is "
                "pretrained decides what is in 4 bits: load the same model on all ranks, or name the layers in "
                "target_modules and the others in modules_to_save."
            )
    return [name for name in numbers if len({other[name] for other in of_ranks}) > 1]


def from_rank_0(values: list[Any], group: Any = None) -> list[Any]:
    source = 0 if group is None else dist.get_global_rank(group, 0)
    dist.broadcast_object_list(values, source, group)
    return values


def _send_weight(layer: LoRALayer, group: Any) -> None:
    weights, initial = from_rank_0([layer.packed_weights, layer.initial], group)
    if dist.get_rank(group) == 0:
        return
    layer.set_packed_weights([weight.to(layer.packed.device) for weight in weights])
    layer.set_initial(initial)
    if layer.input_observer is not None:
        layer.input_observer.leave_to_another_rank()


def _send_parameter(frozen: Frozen, group: Any) -> None:
    value, record = from_rank_0([frozen.parameter.detach().cpu(), frozen.record], group)
    if dist.get_rank(group) != 0:
        frozen.parameter.detach().copy_(value)
        replace_record(frozen, record)
