"""Fold adapters into the decoded weights: QLoRALinear -> the dense layer it was."""

from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from lightning_qlora.adapters.base_model import find_base, plain_name
from lightning_qlora.calibration import close_calibrations
from lightning_qlora.config import check_choice
from lightning_qlora.linear import ATTRIBUTES, DTYPES, QLoRALinear, adapted_layers
from lightning_qlora.merging.rounding import round_at_random
from lightning_qlora.sharded import is_sharded, reshard

Module = TypeVar("Module", bound=nn.Module)
MergeDtype = Literal["auto", "bf16", "fp16", "fp32"]


def merge(module: Module, dtype: MergeDtype = "auto") -> Module:
    """Turn every QLoRALinear back into the dense layer it was, its adapter folded in, in place and layer by layer.

    The new weight is the decoded 4-bit weight plus s B A: what the adapter was trained on top of, added in fp32 and
    rounded once, at random (see `rounding`). It is frozen, as PEFT leaves it.

    Args:
        module: A converted module.
        dtype: Type of the weights: "auto" is the one each had before conversion; any other is given to all floating
            parameters of the module, so that its layers fit together.

    Raises:
        ValueError: If the module holds no QLoRALinear, shards of one, or dtype is not among the allowed ones.
    """
    check_choice("dtype", dtype, get_args(MergeDtype))
    layers = adapted_layers(module)
    if not layers:
        raise ValueError(f"{type(module).__name__} holds no QLoRALinear: there is nothing to merge.")
    close_calibrations(module)
    reshard(module)
    names = {layer: plain_name(name) for name, layer in find_base(module)[1].named_modules()}
    for name, layer in layers.items():
        if is_sharded(layer.packed):
            raise ValueError(f"{name}: is sharded, and a shard can't be merged. Save a checkpoint and merge that.")
        to_dense(layer, merged_weight(layer, layer.weight_dtype if dtype == "auto" else DTYPES[dtype], names[layer]))
    if dtype != "auto":
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[dtype])
    return module


def merged_weight(layer: QLoRALinear, dtype: torch.dtype, name: str) -> Tensor:
    """The weight a dense layer needs to do what base and adapter do, shaped as the dense layer's."""
    total = layer._as_rows(layer.decode().float() + layer.delta())
    return layer._as_rows(round_at_random(total, dtype, name)).contiguous()


def to_dense(layer: QLoRALinear, weight: Tensor) -> None:
    """Make a QLoRALinear the dense layer it was, with this weight, in place; its hooks and other attributes stay."""
    dense_class, bias = layer.dense_class, layer._parameters["bias"]
    own = ATTRIBUTES if issubclass(dense_class, nn.Linear) else ATTRIBUTES | {"in_features", "out_features"}
    for name in own & layer.__dict__.keys():
        del layer.__dict__[name]
    layer._parameters.clear()
    layer.__class__ = dense_class  # type: ignore[assignment]
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    layer.register_parameter("bias", bias)
