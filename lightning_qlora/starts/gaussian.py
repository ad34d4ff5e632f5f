"""PEFT's "gaussian": normal with standard deviation 1 / r."""

import torch
from torch import Tensor


def fill(lora_a: Tensor, generator: torch.Generator) -> None:
    lora_a.normal_(std=1 / len(lora_a), generator=generator)
