"""PEFT's default: `kaiming_uniform_(a=sqrt(5))`, uniform in +-1 / sqrt(in)."""

import math

import torch
from torch import Tensor


def fill(lora_a: Tensor, generator: torch.Generator) -> None:
    bound = 1 / math.sqrt(lora_a.shape[1])
    lora_a.uniform_(-bound, bound, generator=generator)
