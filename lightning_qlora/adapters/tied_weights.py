"""Weights with several names, as an embedding that is also the output embedding, and adapters that break such a tie.

PEFT trains a copy of a module in modules_to_save and leaves the weight that it was tied to unchanged, unless
`ensure_weight_tying` is set.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lightning_qlora.adapters.adapter import PREFIX, Adapter
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.names import plain_name
from lightning_qlora.layers.trainable_tokens import DELTA


def tied_names(base: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several; rows of embeddings that train are excluded, as PEFT ties them."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if not name.endswith(DELTA):
            names.setdefault(id(parameter), []).append(plain_name(name))
    return [group for group in names.values() if len(group) > 1]


def is_one_weight(adapter: Adapter, tied: Sequence[str]) -> bool:
    """Whether an adapter has no value for a tied weight, or the same value for all of its names."""
    values = [adapter.saved[name] for name in tied if name in adapter.saved]
    return not values or (len(values) == len(tied) and all(torch.equal(values[0], value) for value in values))


def check_tie(adapter: Adapter, tied: Sequence[str]) -> None:
    """Refuse an adapter with a value for some names of a tied weight only, or with different values."""
    if is_one_weight(adapter, tied):
        return
    trained = next(name for name in tied if name in adapter.saved)
    others = ", ".join(name for name in tied if name != trained)
    raise CheckpointMismatchError(
        f"{adapter.source}: key '{PREFIX}{trained}' was trained separately from {others}, and in this base they are "
        "one tied weight: it would be a different model. Train with ensure_weight_tying=True (PEFT's LoraConfig)."
    )
