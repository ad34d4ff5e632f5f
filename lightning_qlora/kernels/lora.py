"""LoRA: the operands of an adapter, as `PackedBytes` are those of a 4-bit weight; the checks of a layer's operands."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qlora.quantization.blockwise import FLOATS
from lightning_qlora.quantization.packed_weight import PackedBytes, check_bytes


class LoRA(NamedTuple):
    """The adapter of one call: s (drop(x) A^T) B^T.

    The ops of `ops.py` get its fields one by one, in this order.
    """

    a: Tensor  # [r, in], any float type; of experts [experts, r, in]
    b: Tensor  # [out, r]; of experts [experts, out, r]
    scaling: float = 1.0  # the factor s
    p: float = 0.0  # probability of dropping an element of x
    seed: Tensor | None = None  # int64 [1] on the CPU, which makes the mask of both passes; None: no dropout
    in_fp16: bool = False  # x is fp32, and all products of the call are those of `half.Half`


def check_operands(x: Tensor, weight: PackedBytes, bias: Tensor | None, lora: LoRA) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"x: must be float32, bfloat16 or float16, not {x.dtype}.")
    if lora.in_fp16 and x.dtype is not torch.float32:
        raise TypeError(f"x: must be float32 for products in fp16 whose results are float32, not {x.dtype}.")
    out_features, in_features = weight.shape
    r = lora.a.shape[0]
    matches = x.shape[-1:] == (in_features,) and lora.a.shape == (r, in_features) and lora.b.shape == (out_features, r)
    if not matches or (bias is not None and bias.shape != (out_features,)):
        shapes = [tuple(lora.a.shape), tuple(lora.b.shape), None if bias is None else tuple(bias.shape)]
        raise ValueError(
            f"lora_linear: with a weight [{out_features}, {in_features}] x must be [..., {in_features}], A [r, "
            f"{in_features}], B [{out_features}, r] and bias [{out_features}]; got x {list(x.shape)} and {shapes}."
        )
    check_bytes(weight)
    check_devices(x, weight, lora, bias)


def check_devices(x: Tensor, weight: PackedBytes, lora: LoRA, bias: Tensor | None = None) -> None:
    """Raise ValueError if a layer is not on the device of its input: kernels would read from wrong addresses."""
    device = x.device
    is_one = weight.packed.device == device and lora.a.device == device and lora.b.device == device
    if is_one and (bias is None or bias.device == device):
        return
    devices = {"x": x, "the 4-bit weight": weight.packed, "A": lora.a, "B": lora.b, "the bias": bias}
    places = [f"{name} is on {tensor.device}" for name, tensor in devices.items() if tensor is not None]
    raise ValueError(
        f"{', '.join(places)}. All must be on one device: move the input with x.to(device), or the module with "
        "module.to(device); what is on the meta device has no values, load them first."
    )
