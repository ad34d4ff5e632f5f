"""Which embeddings have rows that train, and which rows: what `trainable_token_indices` names.

A list of rows is meant for the input embedding, a dict names embeddings. Layers with a tied weight have the same rows.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from lightning_qlora.checks import shown
from lightning_qlora.layers.kinds import is_packed
from lightning_qlora.layers.names import LayerNames, inside, join, last_part
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.layers.trainable_tokens import TrainableTokens

ARGUMENT = "trainable_token_indices"
TokenIndices = list[int] | dict[str, list[int]]


def select_tokens(module: nn.Module, tokens: TokenIndices | None, names: dict[int, LayerNames]) -> dict[str, list[int]]:
    """Name of each layer whose rows train, tied ones included -> their indices; without those of earlier conversions.

    A key that fits no layer has no effect here, see `check_tokens`.
    """
    layers = dict(module.named_modules())
    by_name = _named_layers(module, tokens, names)
    by_weight: dict[int, list[int]] = {}
    for name, indices in by_name.items():
        weight = layers[name]._parameters.get("weight")
        if weight is not None:
            by_weight.setdefault(id(weight), indices)
    tied = {
        name: by_weight[id(weight)]
        for name, key, weight in _parameters_of(module)
        if key == "weight" and id(weight) in by_weight
    }
    by_name = tied | by_name
    return {name: indices for name, indices in by_name.items() if not isinstance(layers[name], TrainableTokens)}


def check_tokens(
    module: nn.Module, tokens: TokenIndices | None, names: dict[int, LayerNames], in_full: Mapping[str, Any]
) -> None:
    """Raise ValueError if the argument names no layer, rows beyond a weight, or layers that train in full."""
    layers = dict(module.named_modules())
    by_name = _named_layers(module, tokens, names)
    embeddings = [name for name, layer in layers.items() if isinstance(layer, nn.Embedding)]
    text = f"{type(module).__name__} has no nn.Embedding"
    if embeddings:
        text = f"{type(module).__name__} has the embeddings {embeddings}"
    if isinstance(tokens, list) and not by_name:
        raise ValueError(f"{ARGUMENT}: {text}, so a list does not say which. Pass {{name of the layer: {tokens[:9]}}}.")
    if isinstance(tokens, dict):
        for key in tokens:
            if not any(names[id(layer)].match([key]) for layer in layers.values()):
                raise ValueError(f"{ARGUMENT}: {key!r} fits no module; {text}.")
    by_weight: dict[int, list[int]] = {}
    for name, indices in by_name.items():
        weight = _checked_weight(name, layers[name], indices)
        previous = by_weight.setdefault(id(weight), indices)
        layer = layers[name]
        if isinstance(layer, TrainableTokens) and previous == indices:
            previous = layer.token_adapter.token_indices.tolist()
        if previous != indices:
            raise ValueError(
                f"{ARGUMENT}: {name!r} was converted before, or is tied to a layer, with the rows {shown(previous)}. "
                "Pass these."
            )
    for name, key, parameter in _parameters_of(module):
        if id(parameter) not in by_weight:
            continue
        if any(inside(name, outer) for outer in in_full):
            raise ValueError(
                f"{ARGUMENT}: {name!r} trains in full ({in_full.get(name, 'its module does')}), so single rows can't. "
                f"Leave it out of modules_to_save, or out of {ARGUMENT}."
            )
        if key != "weight" or not isinstance(layers[name], (nn.Embedding, nn.Linear)):
            raise ValueError(
                f"{ARGUMENT}: {join(name, key)!r} is tied to the embedding, and belongs to a "
                f"{type(layers[name]).__name__}, which would not use the rows that train. Name the embedding in "
                "modules_to_save."
            )


def _checked_weight(name: str, layer: nn.Module, indices: list[int]) -> Tensor:
    """The weight of a layer; ValueError if its rows can't train, or if it lacks some of them."""
    weight = layer._parameters.get("weight")
    in_4_bits = isinstance(layer, PackedLayer) or is_packed(layer)
    is_float = weight is not None and weight.is_floating_point()
    if weight is None or in_4_bits or not is_float or not isinstance(layer, (nn.Embedding, nn.Linear)):
        kind = type(layer).__name__
        if in_4_bits:
            kind += " in 4 bits"
        raise ValueError(f"{ARGUMENT}: {name!r} is a {kind}: only rows of nn.Embedding and nn.Linear can train.")
    if weight.is_meta:
        raise ValueError(f"{ARGUMENT}: {name!r} has no values yet. Load the module before it is converted.")
    if max(indices) >= len(weight):
        raise ValueError(
            f"{ARGUMENT}: {name!r} has the {len(weight)} rows 0 to {len(weight) - 1}, and not {max(indices)}. Call "
            "resize_token_embeddings before conversion."
        )
    return weight


def _named_layers(module: nn.Module, tokens: TokenIndices | None, names: dict[int, LayerNames]) -> dict[str, list[int]]:
    """Name of each layer that the argument means -> the indices."""
    if isinstance(tokens, list):
        embeddings = _input_embeddings(module)
        if len(embeddings) != 1:
            return {}
        return {embeddings[0]: tokens}
    by_name: dict[str, list[int]] = {}
    for key, indices in (tokens or {}).items():
        for name, layer in module.named_modules():
            if names[id(layer)].match([key]):
                by_name.setdefault(name, indices)
    return by_name


def _input_embeddings(module: nn.Module) -> list[str]:
    """Names of what `get_input_embeddings` of each model returns; without one, every `embed_tokens` or nn.Embedding."""
    models: list[str] = []
    of_models: set[int] = set()
    for name, part in module.named_modules():
        if callable(getattr(part, "get_input_embeddings", None)) and not any(inside(name, outer) for outer in models):
            models.append(name)
            with suppress(NotImplementedError, AttributeError):  # transformers models without one
                of_models.add(id(part.get_input_embeddings()))
    embeddings = {name: part for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    return (
        [name for name, part in embeddings.items() if id(part) in of_models]
        or [name for name in embeddings if last_part(name) == "embed_tokens"]
        or list(embeddings)
    )


def _parameters_of(module: nn.Module) -> list[tuple[str, str, nn.Parameter | None]]:
    """Name of a module, key and value of each parameter that it holds; tied ones several times."""
    return [(name, key, p) for name, part in module.named_modules() for key, p in part._parameters.items()]
