"""Layers of bitsandbytes' 4 bits, as transformers makes them: their weight as it is, byte for byte."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.quantize.packed import PackedWeight

OWN = (
    "compute_dtype",
    "compute_type_is_set",
    "quant_state",
    "quant_storage",
    "support_avx512bf16_for_cpu",
    "source_cls",
)
CAME_AS = "_qlora_came_as"  # attribute of a dense layer: the 4-bit weight it was decoded from


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
    layer.weight = nn.Parameter(decoded_as_it_came(layer, weight, weight.dtype))


def decoded_as_it_came(layer: nn.Module, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The dense weight of a layer that came in 4 bits, shaped as its class has it; the layer remembers the 4 bits."""
    remember_packed(layer, weight)
    return _as_stored(layer, weight.dequantize(dtype))


def remember_packed(layer: nn.Module, weight: PackedWeight) -> None:
    """Let a dense layer remember the 4-bit weight it was decoded from."""
    # In host memory, a quarter of the dense weight: quantizing that again would not give the same bytes.
    setattr(layer, CAME_AS, weight.to(torch.device("cpu")))


def weight_as_it_came(layer: nn.Module) -> PackedWeight | None:
    """The 4-bit weight a dense layer came in, as long as its dense weight is still what that decodes to."""
    came, dense = vars(layer).get(CAME_AS), layer._parameters.get("weight")
    if came is None or dense is None or dense.is_meta:
        return None
    return came if torch.equal(_as_stored(layer, came.dequantize(dense.dtype)), dense.detach().cpu()) else None


def _as_stored(layer: nn.Module, rows: Tensor) -> Tensor:
    """A weight [out, in] as a dense layer of this class keeps it: a transformers Conv1D has [in, out]."""
    return rows if isinstance(layer, nn.Linear) else rows.T.contiguous()
