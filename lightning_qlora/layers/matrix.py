"""Matrix: what one product of a 4-bit layer needs. A layer has one, a stack one for each expert.

Another kind of adapter is a class with the same methods (`dora.py`) and a row of `ADAPTERS` in `lora_layer.py`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qlora.layers.prepared_call import PreparedCall
from lightning_qlora.quantization.packed_weight import PackedBytes


class Matrix(NamedTuple):
    """A 4-bit weight [out, in], the parameters of its adapter by their names in a layer, and its number in a stack.

    All parameters but A have one row for each output.
    """

    weight: PackedBytes
    lora_A: Tensor
    lora_B: Tensor
    number: int = 0

    call = PreparedCall  # type: ignore[misc]
    reads_weight = False  # type: ignore[misc]  # whether the adapter depends on whole rows of W, which no kernel reads

    def merged(self, weight: Tensor, scaling: float) -> Tensor:
        """W + s B A, fp32, of this W in fp32."""
        return weight + product(self, scaling)

    def effective(self, layer: Any, weight: Tensor) -> Tensor:
        """The same of the layer's own W, differentiable in the adapter."""
        return self.merged(weight, layer.scaling)


def product(matrix: Any, scaling: float) -> Tensor:
    """s B A, [out, in], fp32, under autocast too."""
    with torch.autocast(matrix.lora_B.device.type, enabled=False):
        delta: Tensor = scaling * (matrix.lora_B.float() @ matrix.lora_A.float())
        return delta
