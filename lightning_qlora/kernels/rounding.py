"""Stochastic rounding of fp32 to bf16 or fp16: up or down at random, so that the mean stays.

An adapter changes a weight by tenths of a percent, and the steps of bf16 are 0.4 to 0.8 percent: rounding to the
nearest returns most weights to their old value, which loses the adapter.
"""

import torch
from torch import Tensor

from lightning_qlora.kernels.reference import mix

ROUNDED = (torch.bfloat16, torch.float16)


def round_by_index(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round with a hash of each element's index: the same weight is always rounded the same way, on every device.

    The gradient is that of a cast. Other types than bf16 and fp16 are cast.
    """
    nearest = weight.to(dtype)
    if dtype not in ROUNDED:
        return nearest
    with torch.no_grad():
        index = torch.arange(weight.numel(), dtype=torch.int32, device=weight.device)
        chance = mix(index).view(weight.shape).to(torch.float32) / 2**32 + 0.5
        rounded = round_by_chance(weight.detach(), dtype, chance)
        change = rounded - nearest.detach()  # exact, since these are neighbours
    return nearest + change


def round_by_chance(weight: Tensor, dtype: torch.dtype, chance: Tensor) -> Tensor:
    """Round to bf16 or fp16; `chance` has a random number from 0 to 1 for each element. Exact values do not change."""
    nearest = weight.to(dtype)
    # As integers, neighbours of one sign differ by 1, and the one of larger magnitude is the larger integer.
    away = (weight.abs() > nearest.float().abs()).to(torch.int16).mul(2).sub(1)
    other = (nearest.view(torch.int16) + away).view(dtype)
    share = (weight - nearest.float()) / (other.float() - nearest.float())
    return torch.where(chance < share, other, nearest)
