"""Random numbers of a layer: the same on every rank, and wherever and whenever it is converted."""

import hashlib
import os

import torch


def generator_of(name: str) -> torch.Generator:
    """A generator on the CPU, from a layer's name and the seed of `seed_everything`."""
    key = f"{os.environ.get('PL_GLOBAL_SEED', 0)}/{name}"
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    return torch.Generator("cpu").manual_seed(seed)
