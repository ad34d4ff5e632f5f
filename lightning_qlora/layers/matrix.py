"""Matrix: what one product of a 4-bit layer needs. A layer has one, a stack one for each expert."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qlora.quantization.packed_weight import PackedBytes

TINY = torch.finfo(torch.float32).tiny


class Matrix(NamedTuple):
    """A 4-bit weight [out, in], the parameters of its adapter by their names in a layer, and its number in a stack."""

    weight: PackedBytes
    lora_A: Tensor
    lora_B: Tensor
    lora_magnitude_vector: Tensor | None = None
    number: int = 0

    def product(self, scaling: float) -> Tensor:
        """s B A, [out, in], fp32, under autocast too."""
        with torch.autocast(self.lora_B.device.type, enabled=False):
            return scaling * (self.lora_B.float() @ self.lora_A.float())

    def merged(self, weight: Tensor, scaling: float) -> Tensor:
        """W + s B A, with DoRA m (W + s B A) / ||W + s B A||, fp32, of this W in fp32."""
        total = weight + self.product(scaling)
        if self.lora_magnitude_vector is not None:
            total *= (self.lora_magnitude_vector.float() / total.norm(dim=1).clamp_min(TINY)).unsqueeze(1)
        return total


ADAPTER = Matrix._fields[1:-1]  # the parameters of a layer that train
