"""How an adapter begins (`init_lora_weights`): A is random and B = 0, so the layer computes what its 4-bit base does.

A start is a row of STARTS.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.quantization.packed_weight import PackedBytes
from lightning_qlora.starts.calibrated import begin_again, wait_for_inputs
from lightning_qlora.starts.random_values import default, gaussian, generator_of
from lightning_qlora.tensors.values import has_values


class Start(NamedTuple):
    fill: Callable[[Tensor, torch.Generator], None]  # sets A, fp32 [r, in], on the CPU
    # From a layer and its float weight: what sees its inputs, until a correction of the quantization error is computed.
    observer: Callable[[Any, Tensor], Any] | None = None
    # What a layer does whose loaded adapter was saved before that.
    begin_again: Callable[[Any, Any], None] | None = None


STARTS = {
    "default": Start(default),
    "gaussian": Start(gaussian),
    "calibrated": Start(default, wait_for_inputs, begin_again),
}


def corrects_error(config: Any) -> bool:
    """Whether adapters begin as a correction of the quantization error, and so belong to the 4-bit base.

    `config`: what has `init_lora_weights`.
    """
    return STARTS[config.init_lora_weights].observer is not None


def first_adapter(base: PackedBytes, config: QLoRAConfig, name: str) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r], fp32, on the CPU, for a layer of this name; without values if its base has none."""
    *_, outputs, inputs = base.shape
    shapes = (config.r, inputs), (outputs, config.r)
    if not has_values(base.packed):
        lora_a, lora_b = (base.packed.new_empty(shape, dtype=torch.float32) for shape in shapes)
        return lora_a, lora_b
    lora_a, lora_b = (torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in shapes)
    STARTS[config.init_lora_weights].fill(lora_a, generator_of(name))
    return lora_a, lora_b


def check_packed_start(config: QLoRAConfig) -> None:
    """Raise ValueError if adapters are to be computed from the float weight of a layer that is in 4 bits already."""
    if corrects_error(config):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} needs the float weight, and this one is in 4 bits. "
            "Use 'default' or 'gaussian', or load the model in 16 bits."
        )
