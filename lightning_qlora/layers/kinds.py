"""The kinds of linear layers that become a QLoRALinear.

A new kind is a row of `KINDS` and its tests; all other files ask here how a layer stores its weight and how it is
called. The classes are named, and not imported.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_qlora.quantization.packed_weight import PackedWeight


class LayerKind(NamedTuple):
    transposed: bool = False  # whether the weight is stored as [in, out]
    sizes: tuple[str, str] = ("out_features", "in_features")  # attributes with the numbers of its outputs and inputs
    forward: Callable[..., Tensor] | None = None  # of the 4-bit class; None: as QLoRALinear, or its nn.Linear subclass
    # Of layers whose weight is in 4 bits: removes it, [out, in], and returns it with the class of the dense layer.
    pop_packed: Callable[[Any], tuple[PackedWeight, type[nn.Module]]] | None = None


def _forward_of_conv1d(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.linear(x, self._parameters["bias"])
    return y


def _pop_bnb_weight(layer: nn.Module) -> tuple[PackedWeight, type[nn.Module]]:
    """Remove the weight, and what bitsandbytes and transformers added; ValueError for the layout of its CPU kernel."""
    weight: Any = layer._parameters.pop("weight")
    if getattr(weight.quant_state, "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes repacked this weight when it ran on the CPU in eval mode. Convert the model before it runs."
        )
    entries = {f"weight.{key}": value for key, value in weight.quant_state.as_dict(packed=True).items()}
    dense_class = getattr(layer, "source_cls", nn.Linear)
    for name in (
        "compute_dtype",
        "compute_type_is_set",
        "quant_state",
        "quant_storage",
        "support_avx512bf16_for_cpu",
        "source_cls",
    ):
        vars(layer).pop(name, None)
    return PackedWeight.from_bnb_state_dict({"weight": weight.data, **entries}), dense_class


LINEAR = LayerKind()
KINDS = {
    "transformers.pytorch_utils.Conv1D": LayerKind(True, ("nf", "nx"), _forward_of_conv1d),
    "torch_geometric.nn.dense.linear.Linear": LayerKind(sizes=("out_channels", "in_channels")),
    "bitsandbytes.nn.modules.Linear4bit": LayerKind(pop_packed=_pop_bnb_weight),
}


def kind_of(layer_class: type[nn.Module]) -> LayerKind:
    return KINDS.get(f"{layer_class.__module__}.{layer_class.__qualname__}", LINEAR)


def is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or kind_of(type(layer)) is not LINEAR


def sizes_of(layer: Any) -> tuple[int, int]:
    outputs, inputs = kind_of(type(layer)).sizes
    return getattr(layer, outputs), getattr(layer, inputs)


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer of another library has its weight in 4 bits."""
    is_kind = kind_of(type(layer)).pop_packed is not None
    return is_kind and getattr(layer._parameters["weight"], "quant_state", None) is not None


def pop_packed_weight(layer: nn.Module) -> tuple[PackedWeight, type[nn.Module]]:
    """Remove the weight, [out, in], of a layer for which `is_packed`; returns it and the class of the dense layer."""
    pop = kind_of(type(layer)).pop_packed
    assert pop is not None
    packed, dense_class = pop(layer)
    for name, size in zip(kind_of(dense_class).sizes, packed.shape, strict=True):
        setattr(layer, name, size)
    return packed, dense_class


def decode_packed_layer(layer: nn.Module) -> None:
    weight, dense_class = pop_packed_weight(layer)
    layer.__class__ = dense_class
    layer.weight = nn.Parameter(decode_as_stored(layer, weight))


def decode_as_stored(layer: nn.Module, weight: PackedWeight) -> Tensor:
    rows = weight.dequantize(weight.dtype)
    if kind_of(type(layer)).transposed:
        return rows.T.contiguous()
    return rows
