"""Where an adapter starts."""

import hashlib
import math
import os

import torch
from torch import Tensor

from lightning_qlora.config import QLoRAConfig


def start_of_adapter(in_features: int, out_features: int, config: QLoRAConfig, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] before the first step, fp32, on the CPU: A random and B zero leave the model unchanged.

    "default": A uniform in +-1 / sqrt(in), which is PEFT's kaiming_uniform_(a=sqrt(5)); "gaussian": A normal with
    deviation 1 / r.
    """
    generator = torch.Generator().manual_seed(seed_of_layer(name))
    lora_a = torch.empty(config.r, in_features)
    if config.init_lora_weights == "gaussian":
        lora_a.normal_(std=1 / config.r, generator=generator)
    else:
        lora_a.uniform_(-1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
    return lora_a, torch.zeros(out_features, config.r)


def seed_of_layer(name: str) -> int:
    """A seed from a layer's name and `seed_everything`'s seed: the same on every rank, whatever was drawn before."""
    key = f"{os.environ.get('PL_GLOBAL_SEED', 0)}/{name}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
