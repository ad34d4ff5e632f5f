"""What training changed: an adapter less its start.

An adapter that starts from a quantization error, or from the weight itself (`starts`), belongs to the 4-bit base it was
started with. On the dense weight W the trained layer is, but for what the start left of the error,

    W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]        an adapter of rank 2 r with the same s (PEFT does so for PiSSA)

A0 and B0 are made again from W, so neither a module nor a checkpoint holds them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.fingerprint import fingerprint
from lightning_qlora.quantize.packed import PackedWeight
from lightning_qlora.starts import formulas


@dataclass(frozen=True)
class Origin:
    """What the starts of a module's adapters can be made again from.

    Attributes:
        config: The arguments of the conversion.
        full_names: Layer's name in the base model -> its name in the module, which seeds a start.
        input_rms: Layer's name in the base model -> input sizes that a "calibrated" start was made from.
        fingerprint_of: Layer's name in the base model -> fingerprint of its 4-bit weight, where known.
    """

    config: QLoRAConfig
    full_names: dict[str, str]
    input_rms: dict[str, Tensor]
    fingerprint_of: Callable[[str], int | None]  # computing it reads the whole weight, and most saves don't ask


BITS = ("quant_type", "block_size", "double_quant")


def quantization_of(config: QLoRAConfig) -> dict[str, Any]:
    """How the base of a module's adapters was quantized, and whether and how they started from it; plain values."""
    return {
        "quant_type": config.quant_type,
        "block_size": config.block_size,
        "double_quant": config.double_quant,
        "init_lora_weights": config.init_lora_weights,
        "base_moved": formulas.moves_base(config),
        **({"loftq_config": dict(config.loftq_config)} if config.loftq_config else {}),
    }


def belongs_to(quantization: Mapping[str, Any] | None) -> str | None:
    """In a sentence, the base that adapters of such a start need; None where the dense one does as well."""
    start = (quantization or {}).get("init_lora_weights", "default")
    if quantization is None or start in ("default", "gaussian"):
        return None
    kind = ", ".join(f"{name}={quantization[name]}" for name in BITS)
    if quantization["base_moved"]:
        return (
            f"These adapters started as {start!r}: they belong to the 4-bit weights ({kind}) of this run alone, which "
            "are not the quantized model. Merge them, or export their difference to the start (onto='float')."
        )
    return (
        f"These adapters started as {start!r}, from the error of quantization: they belong to the model in 4 bits "
        f"({kind}). For a model in 16 bit export their difference to the start (onto='float')."
    )


@torch.no_grad()
def start_again(origin: Origin, name: str, weight: Tensor, base: PackedWeight | None = None) -> tuple[Tensor, Tensor]:
    """A0 and B0 that a layer's adapter started from, fp32.

    Args:
        origin: What is known of the start.
        name: The layer, as the base model names it.
        weight: Its dense weight [out, in].
        base: Its 4-bit weight, where the start moved it.

    Raises:
        ValueError: If the start of this weight leaves another 4-bit base than the adapter was trained on.
    """
    config, full_name, rms = origin.config, origin.full_names[name], origin.input_rms.get(name)
    # The weight may have been converted in another type than it is stored in.
    for dtype in dict.fromkeys((weight.dtype, torch.bfloat16, torch.float16)):
        begin = formulas.start(weight.to(dtype), config, full_name)
        if _is_moved_base(begin.base, base) if base is not None else _is_base(begin.base, origin.fingerprint_of(name)):
            if config.start == "calibrated" and rms is not None and bool(rms.any()):
                return formulas.calibrated(weight.to(dtype), begin.base, rms, config, full_name)
            return begin.lora_a, begin.lora_b
    raise ValueError(
        f"{name}: its start can't be made again from this weight: what comes out is not the 4-bit base the adapter was "
        "trained on. Pass the base model of the training, and the PL_GLOBAL_SEED of it for 'pissa_niter_N'."
    )


def _is_moved_base(made: PackedWeight, base: PackedWeight) -> bool:
    """Whether two bases are one but for the last bits of an SVD, which differ between machines."""
    return bool((made.packed.view(-1) == base.packed.to(made.packed).view(-1)).float().mean() > 0.99)


def _is_base(made: PackedWeight, known: int | None) -> bool:
    return known is None or fingerprint_of_weight(made) == known


def fingerprint_of_weight(weight: PackedWeight) -> int:
    """The fingerprint that a layer with this weight has."""
    stored = weight.to_bytes()
    return fingerprint(stored.packed, stored.absmax, stored.nested)


def less_start(lora_a: Tensor, lora_b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """A [2 r, in] and B [out, 2 r] for the same s, fp32; of rank r where the start was B = 0."""
    lora_a, lora_b = lora_a.float(), lora_b.float()
    if not b0.any():
        return lora_a, lora_b
    return torch.cat([lora_a, a0.to(lora_a)]), torch.cat([lora_b, -b0.to(lora_b)], dim=1)
