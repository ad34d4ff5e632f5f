"""Which embeddings `quantize_embeddings` freezes in 4 bits: with the layers that are tied to them, or not at all."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.dotted_names import join
from lightning_qlora.layers.names import LayerNames, inside, matches_outer
from lightning_qlora.layers.packed_embedding import FrozenLayer
from lightning_qlora.layers.token_selection import parameters
from lightning_qlora.layers.trainable_tokens import TrainableTokens
from lightning_qlora.quantization.packed_weight import FLOATS

TRAINS = "trains, or gets an adapter"
SMALL = 10  # an embedding with a tenth of the weights of the largest one, such as that of positions, stays dense


class ToFreeze(NamedTuple):
    """An embedding to freeze in 4 bits: the layers that have its weight, by name, and the arguments."""

    layers: dict[str, nn.Module]
    config: QLoRAConfig


def select_embeddings(
    module: nn.Module, config: QLoRAConfig, names: dict[int, LayerNames], others: Collection[str],
    heads: Collection[int],
) -> tuple[dict[str, ToFreeze], dict[str, str]]:  # fmt: skip
    """The embeddings to freeze, by the name of their first layer; and name -> reason, of layers that stay dense.

    `others`: names of modules, and of parameters, that train in full or get an adapter. `heads`: ids of output
    embeddings. The module may be a model before its weights are loaded.
    """
    layers, tied = dict(module.named_modules()), _ties(module)
    chosen, dense, groups = dict[str, ToFreeze](), dict[str, str](), dict[int, dict[str, nn.Module]]()
    for name, key, parameter in parameters(module):
        if parameter is not None:
            held = groups.setdefault(tied.get(id(parameter), id(parameter)), {})
            held[name if key == "weight" else join(name, key)] = layers[name]
    largest = max((layer.weight.numel() for layer in layers.values() if isinstance(layer, nn.Embedding)), default=0)
    for group in groups.values():
        own = [layer for name, layer in group.items() if name in layers]  # that hold it as their weight
        if not any(isinstance(layer, nn.Embedding) or id(layer) in heads for layer in own):
            continue
        if any(isinstance(layer, TrainableTokens) for layer in own):
            continue  # as an earlier conversion left it
        if any(inside(name, other) or inside(other, name) for name in group for other in others):
            dense |= dict.fromkeys(group, TRAINS)
        elif reason := _reason(group, config, names, largest):
            dense |= dict.fromkeys(group, reason)
        else:
            chosen[next(iter(group))] = ToFreeze(group, config)
    return chosen, dense


def check_embeddings(module: nn.Module, chosen: Mapping[str, ToFreeze], others: Mapping[str, str]) -> None:
    """Raise ValueError if no embedding of a module is, or becomes, frozen in 4 bits; `others`: name -> reason."""
    if chosen or any(isinstance(layer, FrozenLayer) for layer in module.modules()):
        return
    found = [name for name, layer in module.named_modules() if isinstance(layer, nn.Embedding)]
    why = "".join(f"\n  {name}: {others.get(name, TRAINS)}" for name in found) or " It has no nn.Embedding."
    raise ValueError(f"quantize_embeddings=True: no embedding of this {type(module).__name__} can be in 4 bits.{why}")


def _ties(module: nn.Module) -> dict[int, int]:
    """Id of a weight without data -> that of the weight which transformers ties it to when it is loaded."""
    tied = {}
    for model in module.modules():
        keys: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        held = dict(model.named_parameters(remove_duplicate=False)) if keys else {}
        for target, source in keys.items():
            if target in held and source in held and held[target].is_meta:
                tied[id(held[target])] = id(held[source])
    return tied


def _reason(group: Mapping[str, nn.Module], config: QLoRAConfig, names: dict[int, LayerNames], largest: int) -> str:
    """Why the layers of a weight stay dense; an empty string if they can be in 4 bits."""
    for name, layer in group.items():
        weight, kind = layer._parameters.get("weight"), type(layer).__name__
        if any(matches_outer(form, config.exclude_modules or []) for form in names[id(layer)].forms):
            return "in exclude_modules" if len(group) == 1 else f"tied to {name}, which is in exclude_modules"
        if weight is None or not isinstance(layer, (nn.Embedding, nn.Linear)):
            return f"its weight is tied to {name}, of a {kind}, which would not read it in 4 bits"
        if weight.dtype not in FLOATS:
            return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
        if not isinstance(layer, nn.Embedding):
            continue
        if layer.embedding_dim % config.block_size:
            return f"its rows of {layer.embedding_dim} weights are no whole blocks of {config.block_size}"
        if layer.max_norm is not None:
            return "max_norm changes the rows that are read"
        if SMALL * weight.numel() <= largest:
            return "has less than a tenth of the weights of the largest embedding"
    return ""
