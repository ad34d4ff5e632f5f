"""Matrix: what one product of a 4-bit layer needs. A layer has one, a stack one for each expert."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qlora.quantization.packed_weight import PackedBytes


class Matrix(NamedTuple):
    """A 4-bit weight [out, in] with its adapter."""

    weight: PackedBytes
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None = None
    number: int = 0  # in a stack

    def product(self, scaling: float) -> Tensor:
        """s B A, [out, in], fp32, under autocast too."""
        with torch.autocast(self.lora_b.device.type, enabled=False):
            return scaling * (self.lora_b.float() @ self.lora_a.float())
