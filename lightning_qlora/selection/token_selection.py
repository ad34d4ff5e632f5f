"""Rows of embeddings that train: which ones `trainable_token_indices` names, checked and added.

A list of rows is meant for the input embedding, a dict names embeddings. Layers with a tied weight have the same rows.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from lightning_qlora.checks import TRAIN_IN_FULL, shown
from lightning_qlora.config import TokenIndices
from lightning_qlora.layers.kinds import is_packed
from lightning_qlora.layers.names import join, last_part, outer_names
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.layers.trainable_tokens import train_tokens
from lightning_qlora.selection.patterns import Patterns
from lightning_qlora.survey.survey import STACKS, Kind, Part, Survey

ARGUMENT = "trainable_token_indices"


class TokenRows(dict[str, list[int]]):
    """Name of each layer whose rows train, tied ones included -> their indices; without those of earlier conversions.

    A key of the argument that fits no layer has no effect here, see `check`.
    """

    def __init__(self, seen: Survey, argument: TokenIndices) -> None:
        super().__init__(_chosen(seen, argument))
        self._seen = seen
        self._argument = argument

    def check(self, in_full: Mapping[str, Any]) -> None:
        check_tokens(self._seen, self._argument, in_full)

    def apply(self) -> None:
        """Let rows of frozen embeddings train; layers with a tied weight share them."""
        modules = dict(self._seen.modules)
        tied: dict[int, list[str]] = {}
        for name in self:
            tied.setdefault(id(modules[name]._parameters.get("weight")), []).append(name)
        for names in tied.values():
            train_tokens([modules[name] for name in names], self[names[0]])


def _chosen(seen: Survey, tokens: TokenIndices) -> dict[str, list[int]]:
    named = _named_layers(seen, tokens)
    rows: dict[str, list[int]] = {}  # by the name of each tied weight
    for part, indices in named:
        if "weight" in part.parameters:
            for name in (join(part.names.full, "weight"), *part.parameters["weight"].ties):
                rows.setdefault(name, indices)
    tied = {part.names.full: rows.get(join(part.names.full, "weight")) for part in seen.parts} if rows else {}
    chosen = tied | {part.names.full: indices for part, indices in named}
    earlier = {part.names.full for part in seen.parts if part.kind is Kind.DECIDED}
    return {name: indices for name, indices in chosen.items() if indices is not None and name not in earlier}


def check_tokens(seen: Survey, tokens: TokenIndices, in_full: Mapping[str, Any]) -> None:
    """Raise ValueError if the argument names no layer, rows beyond a weight, or layers that train in full."""
    named = _named_layers(seen, tokens)
    embeddings = [name for name, layer in seen.modules if isinstance(layer, nn.Embedding)]
    text = f"{seen.class_name} has no nn.Embedding"
    if embeddings:
        text = f"{seen.class_name} has the embeddings {embeddings}"
    if isinstance(tokens, list) and not named:
        raise ValueError(f"{ARGUMENT}: {text}, so a list does not say which. Pass {{name of the layer: {tokens[:9]}}}.")
    if isinstance(tokens, dict):
        for key in tokens:
            pattern = Patterns([key])
            if not any(pattern.match(part.names.for_patterns) for part in seen.parts if part.kind not in STACKS):
                raise ValueError(f"{ARGUMENT}: {key!r} fits no module; {text}.")
    by_weight: dict[int, list[int]] = {}
    for part, indices in named:
        name, layer = part.names.full, part.owner
        weight = _checked_weight(name, layer, indices)
        previous = by_weight.setdefault(id(weight), indices)
        if part.kind is Kind.DECIDED and previous == indices:
            previous = layer.token_adapter.token_indices.tolist()
        if previous != indices:
            raise ValueError(
                f"{ARGUMENT}: {name!r} was converted before, or is tied to a layer, with the rows {shown(previous)}. "
                "Pass these."
            )
    for name, layer in seen.modules:
        for key, parameter in layer._parameters.items():
            if id(parameter) not in by_weight:
                continue
            if not in_full.keys().isdisjoint(outer_names(name)):
                raise ValueError(
                    f"{ARGUMENT}: {name!r} trains in full ({in_full.get(name, 'its module does')}), so single rows "
                    f"can't. Leave it out of modules_to_save, or out of {ARGUMENT}."
                )
            if key != "weight" or not isinstance(layer, (nn.Embedding, nn.Linear)):
                raise ValueError(
                    f"{ARGUMENT}: {join(name, key)!r} is tied to the embedding, and belongs to a "
                    f"{type(layer).__name__}, which would not use the rows that train. For such embeddings, "
                    f"{TRAIN_IN_FULL}."
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


def _named_layers(seen: Survey, tokens: TokenIndices) -> list[tuple[Part, list[int]]]:
    parts = [part for part in seen.parts if part.kind not in STACKS]
    if isinstance(tokens, list):
        embeddings = _input_embeddings(seen)
        return [(part, tokens) for part in parts if [part.names.full] == embeddings]
    keys = {key: Patterns([key]) for key in tokens}
    matching = [(part, next((k for k in keys if keys[k].match(part.names.for_patterns)), None)) for part in parts]
    return [(part, tokens[key]) for part, key in matching if key is not None]


def _input_embeddings(seen: Survey) -> list[str]:
    """Names of what `get_input_embeddings` of each model returns; without one, every `embed_tokens` or nn.Embedding."""
    models: set[str] = set()
    of_models: set[int] = set()
    for name, part in seen.modules:
        if callable(getattr(part, "get_input_embeddings", None)) and models.isdisjoint(outer_names(name)):
            models.add(name)
            with suppress(NotImplementedError, AttributeError):  # transformers models without one
                of_models.add(id(part.get_input_embeddings()))  # type: ignore[operator]
    embeddings = {name: part for name, part in seen.modules if isinstance(part, nn.Embedding)}
    return (
        [name for name, part in embeddings.items() if id(part) in of_models]
        or [name for name in embeddings if last_part(name) == "embed_tokens"]
        or list(embeddings)
    )
