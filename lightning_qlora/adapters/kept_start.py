"""The start of an adapter that comes from a folder or a checkpoint: which base it needs, and that it is said again."""

from collections.abc import Mapping
from typing import Any

from lightning_qlora import starts
from lightning_qlora.adapters.folder import Adapter
from lightning_qlora.linear import QLoRALinear
from lightning_qlora.linear_state import CheckpointMismatchError
from lightning_qlora.starts.since_start import BITS, belongs_to, quantization_of

ELSE = "Or export the checkpoint that it came from with onto='float', for a base in 16 bit."


def quantization_of_layer(layer: QLoRALinear) -> dict[str, Any]:
    """`quantization_of` its config, with the quantization that its weight has, which may have come in 4 bits."""
    return quantization_of(layer.config) | bits_of(layer)


def bits_of(layer: QLoRALinear) -> dict[str, Any]:
    """How the weight of a layer is quantized."""
    return {
        "quant_type": layer.quant_type,
        "block_size": layer.block_size,
        "double_quant": layer.nested.numel() > 0,
    }


def check_start_fits(adapter: Adapter, layers: Mapping[str, QLoRALinear]) -> None:
    """Refuse layers whose 4-bit weights are not those that an adapter of such a start belongs to.

    Raises:
        CheckpointMismatchError: As above; says which base it needs.
    """
    known = adapter.quantization or {}
    for name, layer in layers.items():
        if known.get("base_moved") or starts.moves_base(layer.config):
            if adapter.base_fingerprints.get(name) != layer.base_fingerprint():
                whose = "of these adapters" if known.get("base_moved") else "of this module's own adapters"
                raise CheckpointMismatchError(
                    f"{adapter.source}: does not fit {name}: the start {whose} moved the 4-bit weights, and the "
                    f"adapter belongs to others. Put it on the folder that save_quantized wrote with it. {ELSE}"
                )
        elif belongs_to(adapter.quantization) and any(known.get(key) != value for key, value in bits_of(layer).items()):
            there, here = (", ".join(f"{key}={of.get(key)}" for key in BITS) for of in (known, bits_of(layer)))
            raise CheckpointMismatchError(
                f"{adapter.source}: does not fit {name}: the adapter started as {known['init_lora_weights']!r}, from "
                f"the error of quantization to {there}, and here it is {here}. Convert as it was. {ELSE}"
            )


def keep_start(layer: QLoRALinear, quantization: Mapping[str, Any] | None) -> None:
    """Have a layer say of the adapter that it was given where that started: saving it again needs it."""
    said = quantization or {}
    layer.config = layer.config.with_start(said.get("init_lora_weights", "default"), said.get("loftq_config"))
