"""Layers in bitsandbytes' 4 bits, as transformers makes them: their weight without requantizing."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.quantization.packed_weight import PackedWeight

# Attributes that bitsandbytes and transformers add to a layer.
ATTRIBUTES_OF_BNB = (
    "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu", "source_cls",
)  # fmt: skip
ORIGINAL_PACKED = "_qlora_original_packed"  # attribute of a dense layer: the 4-bit weight that it was decoded from


def is_bnb_linear(layer: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' Linear4bit with a quantized weight; doesn't import bitsandbytes."""
    kind = type(layer)
    if kind.__name__ != "Linear4bit" or not kind.__module__.startswith("bitsandbytes."):
        return False
    return getattr(layer._parameters["weight"], "quant_state", None) is not None


def pop_bnb_weight(layer: nn.Module) -> tuple[PackedWeight, type[nn.Module]]:
    """Remove the weight and bitsandbytes' attributes from a Linear4bit; returns it and the class of the dense layer.

    Raises ValueError if bitsandbytes has repacked the weight for its CPU kernel, or its type is unknown.
    """
    weight: Any = layer._parameters.pop("weight")
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes repacked this weight when it ran on the CPU in eval mode. Convert the model before it runs."
        )
    entries = {f"weight.{key}": value for key, value in weight.quant_state.as_dict(packed=True).items()}
    packed = PackedWeight.from_bnb_state_dict({"weight": weight.data, **entries})
    dense_class = getattr(layer, "source_cls", nn.Linear)
    for name in ATTRIBUTES_OF_BNB:
        vars(layer).pop(name, None)
    if not issubclass(dense_class, nn.Linear):  # transformers' Conv1D
        layer.nf, layer.nx = packed.shape  # type: ignore[assignment]
    return packed, dense_class


def decode_bnb_layer(layer: nn.Module) -> None:
    """Turn a Linear4bit into the dense layer that it was, in place."""
    weight, layer.__class__ = pop_bnb_weight(layer)
    layer.weight = nn.Parameter(decode_and_store_original(layer, weight))


def decode_and_store_original(layer: nn.Module, weight: PackedWeight) -> Tensor:
    """The dense weight for a layer from its 4 bits, which the layer keeps for `original_packed_weight`."""
    # In host memory, a quarter of the dense weight: quantizing that again would not give the same bytes.
    setattr(layer, ORIGINAL_PACKED, weight.to(torch.device("cpu")))
    return _as_stored(layer, weight.dequantize(weight.dtype))


def original_packed_weight(layer: nn.Module) -> PackedWeight | None:
    """The 4-bit weight that a dense layer was decoded from; None if it was not, or its weight has changed since."""
    packed, dense = vars(layer).get(ORIGINAL_PACKED), layer._parameters.get("weight")
    if packed is None or dense is None or dense.is_meta:
        return None
    return packed if torch.equal(_as_stored(layer, packed.dequantize(dense.dtype)), dense.detach().cpu()) else None


def _as_stored(layer: nn.Module, rows: Tensor) -> Tensor:
    """A weight [out, in] in the layout of a dense layer: a transformers Conv1D has [in, out]."""
    return rows if isinstance(layer, nn.Linear) else rows.T.contiguous()
