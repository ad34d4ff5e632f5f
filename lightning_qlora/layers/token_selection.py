"""Which layers have rows that train: those that `trainable_token_indices` names, and the layers tied to them."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from lightning_qlora.checks import shown
from lightning_qlora.layers.kinds import is_packed
from lightning_qlora.layers.names import LayerNames, inside, join, last_part, matches
from lightning_qlora.layers.qlora_linear import QLoRALinear
from lightning_qlora.layers.trainable_tokens import TrainableTokens

ARGUMENT = "trainable_token_indices"
TokenIndices = list[int] | dict[str, list[int]]


def select_tokens(module: nn.Module, given: TokenIndices | None, names: dict[int, LayerNames]) -> dict[str, list[int]]:
    """Name of each layer whose rows train, tied ones included -> their indices; without those of earlier conversions.

    A key that fits no layer has no effect here, see `check_tokens`.
    """
    chosen, tied = _named_layers(module, given, names), dict[int, list[int]]()
    layers = dict(module.named_modules())
    for name, indices in chosen.items():
        if (weight := layers[name]._parameters.get("weight")) is not None:
            tied.setdefault(id(weight), indices)
    others = {name: tied[id(w)] for name, key, w in parameters(module) if key == "weight" and id(w) in tied}
    found = (others | chosen).items()
    return {name: indices for name, indices in found if not isinstance(layers[name], TrainableTokens)}


def check_tokens(
    module: nn.Module, given: TokenIndices | None, names: dict[int, LayerNames], in_full: Mapping[str, Any]
) -> None:
    """Raise ValueError if the argument names no layer, rows beyond a weight, or layers that train in full."""
    layers, chosen = dict(module.named_modules()), _named_layers(module, given, names)
    embeddings = [name for name, layer in layers.items() if isinstance(layer, nn.Embedding)]
    what = f"{type(module).__name__} has {f'the embeddings {embeddings}' if embeddings else 'no nn.Embedding'}"
    if isinstance(given, list) and not chosen:
        raise ValueError(f"{ARGUMENT}: {what}, so a list does not say which. Pass {{name of the layer: {given[:9]}}}.")
    for key in given if isinstance(given, dict) else ():
        if not any(matches(form, [key]) for layer in layers.values() for form in names[id(layer)].forms):
            raise ValueError(f"{ARGUMENT}: {key!r} fits no module; {what}.")
    by_weight: dict[int, list[int]] = {}
    for name, indices in chosen.items():
        layer = layers[name]
        weight = layer._parameters.get("weight")
        in_4_bits = isinstance(layer, QLoRALinear) or is_packed(layer)
        can_train = weight is not None and weight.is_floating_point()
        if in_4_bits or not isinstance(layer, (nn.Embedding, nn.Linear)) or not can_train:
            kind = f"{type(layer).__name__}{' in 4 bits' if in_4_bits else ''}"
            raise ValueError(f"{ARGUMENT}: {name!r} is a {kind}: only rows of nn.Embedding and nn.Linear can train.")
        assert weight is not None
        if weight.is_meta:
            raise ValueError(f"{ARGUMENT}: {name!r} has no values yet. Load the module before it is converted.")
        if max(indices) >= len(weight):
            raise ValueError(
                f"{ARGUMENT}: {name!r} has the {len(weight)} rows 0 to {len(weight) - 1}, and not {max(indices)}. Call "
                "resize_token_embeddings before conversion."
            )
        known = layer.token_adapter.token_indices.tolist() if isinstance(layer, TrainableTokens) else indices
        if known != indices or (known := by_weight.setdefault(id(weight), indices)) != indices:
            raise ValueError(
                f"{ARGUMENT}: {name!r} was converted before, or is tied to a layer, with the rows {shown(known)}. Pass "
                "these."
            )
    for name, key, weight in parameters(module):
        if id(weight) not in by_weight:
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


def _named_layers(module: nn.Module, given: TokenIndices | None, names: dict[int, LayerNames]) -> dict[str, list[int]]:
    if isinstance(given, list):
        found = _input_embeddings(module)
        return {found[0]: given} if len(found) == 1 else {}
    chosen: dict[str, list[int]] = {}
    for key, indices in (given or {}).items():
        for name, layer in module.named_modules():
            if any(matches(form, [key]) for form in names[id(layer)].forms):
                chosen.setdefault(name, indices)
    return chosen


def _input_embeddings(module: nn.Module) -> list[str]:
    """Names of what `get_input_embeddings` of each model returns; without one, every `embed_tokens` or nn.Embedding."""
    models, found = list[str](), set[int]()
    for name, part in module.named_modules():
        if callable(getattr(part, "get_input_embeddings", None)) and not any(inside(name, outer) for outer in models):
            models.append(name)
            with suppress(NotImplementedError, AttributeError):  # transformers models without one
                found.add(id(part.get_input_embeddings()))
    every = {name: part for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    own = [name for name, part in every.items() if id(part) in found]
    return own or [name for name in every if last_part(name) == "embed_tokens"] or list(every)


def parameters(module: nn.Module) -> list[tuple[str, str, nn.Parameter | None]]:
    """Name of a module, key and value of each parameter that it holds; tied ones several times."""
    return [(name, key, p) for name, part in module.named_modules() for key, p in part._parameters.items()]
