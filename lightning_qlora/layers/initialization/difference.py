"""What training changed: an adapter minus its initial values.

An adapter that was initialized from the weight or its quantization error (`methods`) belongs to the 4-bit base of its
run. With the float weight W in place of that base, the trained layer is (up to the part of the quantization error that
the initial values did not correct)

    W + s (B A - B0 A0) = W + s [B, -B0] [A; A0]        an adapter of rank 2 r with the same s (as PEFT does for PiSSA)

A0 and B0 are computed again from W, so neither a module nor a checkpoint stores them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.fingerprint import fingerprint_of_weight
from lightning_qlora.layers.initialization import methods
from lightning_qlora.quantization.packed_weight import PackedWeight


@dataclass(frozen=True)
class InitializationRecord:
    """What is needed to compute the initial adapters of a module again; layers by their names in the base model."""

    config: QLoRAConfig  # the arguments of the conversion
    seed_names: dict[str, str]  # the name that the seed of a layer's adapter was made from
    input_rms: dict[str, Tensor]  # that a "calibrated" adapter was computed from
    # The fingerprint of a 4-bit weight, None if not known. A function: it reads the weight, and few callers need it.
    fingerprint_of: Callable[[str], int | None]


@torch.no_grad()
def recompute_initial(
    origin: InitializationRecord, name: str, weight: Tensor, base: PackedWeight | None = None
) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r], fp32: the initial adapter of a layer, by its name in the base model.

    `weight` is its float weight [out, in], `base` its 4-bit weight, if the initialization changed that. ValueError if
    this weight gives another 4-bit base than the adapter was trained on.
    """
    config, seed_name, rms = origin.config, origin.seed_names[name], origin.input_rms.get(name)
    expected = origin.fingerprint_of(name) if base is None else None
    # The weight may have been converted in another type than the file has.
    for dtype in dict.fromkeys((weight.dtype, torch.bfloat16, torch.float16)):
        made, a0, b0 = methods.initialize(weight.to(dtype), config, seed_name)
        if base is None:
            same = expected is None or fingerprint_of_weight(made) == expected
        else:  # equal up to the last bits of an SVD, which differ between machines
            same = bool((made.packed.view(-1) == base.packed.to(made.packed).view(-1)).float().mean() > 0.99)
        if same:
            if config.initialization == "calibrated" and rms is not None and bool(rms.any()):
                return methods.calibrated_adapter(weight.to(dtype), made, rms, config, seed_name)
            return a0, b0
    raise ValueError(
        f"{name}: the initial adapter can't be computed from this weight, because quantizing it does not give the "
        "4-bit base that the adapter was trained on. Pass the base model of the training; for 'pissa_niter_N' also set "
        "the environment variable PL_GLOBAL_SEED to the seed of the training."
    )


def subtract_initial(lora_a: Tensor, lora_b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """A [2 r, in] and B [out, 2 r] of the difference, for the same s, fp32; of rank r if B0 is 0."""
    lora_a, lora_b = lora_a.float(), lora_b.float()
    if not b0.any():
        return lora_a, lora_b
    return torch.cat([lora_a, a0.to(lora_a)]), torch.cat([lora_b, -b0.to(lora_b)], dim=1)
