"""Weights under several names, as an embedding that is the output embedding too, and adapters that part them.

PEFT trains a copy of a module in modules_to_save, and leaves the weight it was tied to as it was, unless
`ensure_weight_tying` is set.
"""

from collections.abc import Sequence

import torch
from torch import nn

from lightning_qlora.adapters.base_model import plain_name
from lightning_qlora.adapters.folder import PREFIX, Adapter


def tied_names(base: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return [group for group in names.values() if len(group) > 1]


def trained_apart(adapter: Adapter, tied: Sequence[str]) -> bool:
    """Whether an adapter trained one name of a tied weight and not the others, or the others to something else."""
    values = [adapter.saved[name] for name in tied if name in adapter.saved]
    return bool(values) and not (len(values) == len(tied) and all(torch.equal(values[0], v) for v in values))


def tie_broken(adapter: Adapter, tied: Sequence[str]) -> str:
    """In a sentence, why an adapter that trained names of a tied weight apart can't be put on it."""
    trained = next(name for name in tied if name in adapter.saved)
    others = ", ".join(name for name in tied if name != trained)
    return (
        f"{adapter.source}: key '{PREFIX}{trained}' was trained apart from {others}, and in this base they are one "
        "tied weight: put on it the model would be another. Train with ensure_weight_tying=True (PEFT's LoraConfig)."
    )
