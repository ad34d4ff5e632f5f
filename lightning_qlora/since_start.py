"""What training changed: an adapter less its start, for a base in 16 bit.

An adapter that starts from a quantization error, or from the weight itself (`starts`), belongs to the 4-bit base it was
started with. On the dense weight W the trained layer is, but for what the start left of the error,

    W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]        an adapter of rank 2 r with the same s (PEFT does so for PiSSA)

A0 and B0 are made again from W, so a checkpoint need not hold them.
"""

import torch
from torch import Tensor

from lightning_qlora import starts
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.linear import QLoRALinear


def belongs_to(config: QLoRAConfig) -> str | None:
    """In a sentence, the base that adapters of this kind of start need; None where the dense one does as well."""
    if config.start not in ("loftq", "pissa", "calibrated"):
        return None
    kind = f"{config.quant_type}, block_size={config.block_size}, double_quant={config.double_quant}"
    if starts.moves_base(config):
        return (
            f"These adapters started as {config.init_lora_weights!r}: they belong to the 4-bit weights ({kind}) of "
            "this run alone, which are not the quantized model. Merge them, or export their difference to the start."
        )
    return (
        f"These adapters started as {config.init_lora_weights!r}, from the error of quantization: they belong to the "
        f"model in 4 bits ({kind}). For a model in 16 bit export their difference to the start."
    )


@torch.no_grad()
def since_start(layer: QLoRALinear, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The adapter less its start: A [2 r, in] and B [out, 2 r] in fp32, for the same s; r where B started at zero.

    Args:
        layer: A trained layer.
        weight: The dense weight it was converted from, in the same type, shaped as the dense layer has it.

    Raises:
        ValueError: If the layer has magnitudes (DoRA), whose product is no low-rank difference, or the start can't be
            made again because the layer still waits for its first batch.
    """
    if layer.lora_magnitude_vector is not None:
        raise ValueError(f"{layer.full_name}: DoRA's change is no adapter of rank 2 r. Merge the layer instead.")
    if layer.dense_weight is not None:
        raise ValueError(f"{layer.full_name}: has not started yet (init_lora_weights='calibrated' waits for training).")
    a, b = layer.lora_A.detach().float(), layer.lora_B.detach().float()
    rows = layer._as_rows(weight.detach()).to(a.device)
    config, name = layer.config, layer.full_name
    if config.start == "calibrated" and layer.input_rms is not None and bool(layer.input_rms.any()):
        a0, b0 = starts.calibrated(rows, layer.packed_weight, layer.input_rms, config, name)
    elif config.start in ("loftq", "pissa"):
        _, a0, b0 = starts.start(rows, config, name)
    else:
        return a, b
    return torch.cat([a, a0.to(a)]), torch.cat([b, -b0.to(b)], dim=1)
