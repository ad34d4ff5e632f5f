"""Cards by name, for `plan --gpu T4`: their memory, and whether they compute in bf16."""

import re
from typing import NamedTuple

from lightning_qlora.checks import shown

GIB = 2**30


class Card(NamedTuple):
    """A graphics card; `memory` in bytes, as its driver reports it (less than the name says where ECC takes a part)."""

    memory: int
    bf16: bool


def _cards(bf16: bool, **memory: float) -> dict[str, Card]:
    return {name: Card(int(size * GIB), bf16) for name, size in memory.items()}


# Names in lower case, without the maker and spaces; memory in GiB.
CARDS = {
    **_cards(False, t4=15, v100=16, v10032gb=32, rtx2060=6, rtx2070=8, rtx2080=8, rtx2080ti=11, titanrtx=24),
    **_cards(True, rtx3060=12, rtx3070=8, rtx3080=10, rtx3080ti=12, rtx3090=24, rtx3090ti=24),
    **_cards(True, rtx4060=8, rtx4060ti=8, rtx4060ti16gb=16, rtx4070=12, rtx4070ti=12, rtx4080=16, rtx4090=24),
    **_cards(True, rtx5060ti=8, rtx5060ti16gb=16, rtx5070=12, rtx5070ti=16, rtx5080=16, rtx5090=32),
    **_cards(True, rtxa6000=48, rtx6000ada=48, a10=22.5, a10g=22.5, l4=22.5, l40s=45),
    **_cards(True, a100=40, a10040gb=40, a10080gb=80, h100=80, h200=140, b200=179),
    **_cards(True, mi210=64, mi250=64, mi300x=192),
}


def find_card(name: str, device: str) -> Card:
    """The card of a name such as "T4" or "NVIDIA GeForce RTX 2080 Ti"; ValueError for one that is not in the list."""
    if device == "cpu":
        raise ValueError(f"gpu={shown(name)}: is for device='gpu', not for device='cpu'. Leave out one of the two.")
    key = re.sub(r"nvidia|amd|geforce|tesla|instinct|pcie|sxm\d?|[\s_-]", "", str(name).lower())
    if key not in CARDS:
        raise ValueError(
            f"gpu={shown(name)}: must be one of {', '.join(CARDS)}. For another card pass its memory, such as "
            "gpu_memory=24GiB, and compute_dtype=fp16 if it has no bf16."
        )
    return CARDS[key]
