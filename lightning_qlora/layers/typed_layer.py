"""TypedLayer: in which type a call of a 4-bit layer computes, and of which type its output is."""

import torch
from torch import Tensor

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels.ops import has_autocast
from lightning_qlora.kernels.products import cast
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.tensors.device_types import has_bf16, is_our_autocast

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class TypedLayer(PackedLayer):
    """A 4-bit weight that is multiplied in the type of its config, of autocast, or of the float weight."""

    config: QLoRAConfig  # the arguments of the conversion, with this layer's r and lora_alpha and without patterns

    def compute_dtype(self, device: str) -> torch.dtype:
        """The type that a call on this type of device multiplies in: the configured one, autocast's, or the weight's.

        A GPU multiplies fp32 weights in bf16, and in fp16 if it has no bf16. Weights in fp64 are multiplied in fp32.
        """
        if self.config.compute_dtype != "auto":
            return DTYPES[self.config.compute_dtype]
        autocast = self.autocast_dtype(device)
        if autocast is not None:
            return autocast
        if self.weight_dtype is torch.float64:
            return torch.float32
        if device in ("cuda", "xpu") and self.weight_dtype is not torch.float16:
            return torch.bfloat16 if has_bf16(device) else torch.float16
        return self.weight_dtype

    def autocast_dtype(self, device: str) -> torch.dtype | None:
        """The type of autocast on a type of device; None: without.

        In a module of 16 bits that this package runs under autocast (`full_precision.py`), a layer in fp32 computes
        without it.
        """
        if not has_autocast(device) or (self.weight_dtype is torch.float32 and is_our_autocast()):
            return None
        return torch.get_autocast_dtype(device)

    def cast_input(self, x: Tensor) -> tuple[Tensor, bool]:
        """x in the type of the call, and whether its products are those of `kernels/half.py`, which take fp32.

        Under autocast in fp16 they are plain products in fp16, as those of other layers are: the loop that uses it
        scales its loss.
        """
        device = x.device.type
        dtype = self.compute_dtype(device)
        in_fp16 = dtype is torch.float16 and self.autocast_dtype(device) is not torch.float16
        if in_fp16:
            dtype = torch.float32
        if x.dtype is dtype:
            return x, in_fp16
        if not x.is_floating_point():  # the result would be rounded to integers
            raise TypeError(
                "x: must be float32, bfloat16 or float16 (or float64, computed in float32), not "
                f"{x.dtype}. Cast it first."
            )
        return x.to(dtype), in_fp16

    def cast_output(self, y: Tensor, input_dtype: torch.dtype) -> Tensor:
        """y in the type of the input; under autocast in that of other layers, and of a module held in fp32 as it is."""
        autocast = self.autocast_dtype(y.device.type)
        if autocast is not None:
            return y.to(autocast)
        return y if self.is_held else cast(y, input_dtype)
