"""Layers of bitsandbytes' 4 bits, as transformers makes them: their weight as it is, byte for byte."""

from typing import Any

from torch import nn

from lightning_qlora.quantize.packed import PackedWeight

OWN = (
    "compute_dtype",
    "compute_type_is_set",
    "quant_state",
    "quant_storage",
    "support_avx512bf16_for_cpu",
    "source_cls",
)


def is_bnb_linear(layer: nn.Module) -> bool:
    """Whether a layer is bitsandbytes' Linear4bit, with its weight quantized; doesn't import bitsandbytes."""
    kind = type(layer)
    if kind.__name__ != "Linear4bit" or not kind.__module__.startswith("bitsandbytes."):
        return False
    return getattr(layer._parameters["weight"], "quant_state", None) is not None


def take_bnb_weight(layer: nn.Module) -> tuple[PackedWeight, type[nn.Module]]:
    """The 4-bit weight of a Linear4bit, and the class of the dense layer it was; nothing of bitsandbytes' stays.

    Raises:
        ValueError: If bitsandbytes has repacked the weight for its CPU kernel, or its type is not ours.
    """
    weight: Any = layer._parameters.pop("weight")
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes repacked this weight when it ran on the CPU in eval mode. Convert the model before it runs."
        )
    entries = {f"weight.{key}": value for key, value in weight.quant_state.as_dict(packed=True).items()}
    packed = PackedWeight.from_bnb_state_dict({"weight": weight.data, **entries})
    dense_class = getattr(layer, "source_cls", nn.Linear)
    for name in OWN:
        vars(layer).pop(name, None)
    if not issubclass(dense_class, nn.Linear):  # transformers' Conv1D
        layer.nf, layer.nx = packed.shape  # type: ignore[assignment]
    return packed, dense_class


def decode_bnb_layer(layer: nn.Module) -> None:
    """Make a Linear4bit the dense layer it was, in place."""
    weight, dense_class = take_bnb_weight(layer)
    layer.__class__ = dense_class
    dense = weight.dequantize()
    layer.weight = nn.Parameter(dense if issubclass(dense_class, nn.Linear) else dense.T.contiguous())
