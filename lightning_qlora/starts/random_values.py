"""The random values that A begins with: the same on every rank, and wherever and whenever a layer is converted."""

import hashlib
import math
import os

import torch
from torch import Tensor


def generator_of(name: str) -> torch.Generator:
    """A generator on the CPU, from a layer's name and the seed of `seed_everything`."""
    key = f"{os.environ.get('PL_GLOBAL_SEED', 0)}/{name}"
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    return torch.Generator("cpu").manual_seed(seed)


def default(lora_a: Tensor, generator: torch.Generator) -> None:
    """PEFT's default: `kaiming_uniform_(a=sqrt(5))`, uniform in +-1 / sqrt(in)."""
    bound = 1 / math.sqrt(lora_a.shape[1])
    lora_a.uniform_(-bound, bound, generator=generator)


def gaussian(lora_a: Tensor, generator: torch.Generator) -> None:
    """PEFT's "gaussian": normal with standard deviation 1 / r."""
    lora_a.normal_(std=1 / len(lora_a), generator=generator)
