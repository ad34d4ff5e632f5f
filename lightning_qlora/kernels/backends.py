"""Which module computes the ops on a device, and the functions that such a module must have."""

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels import eager
from lightning_qlora.quantization.packed_weight import PackedBytes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as Triton does


class Backend(Protocol):
    """The functions of a backend module; `reference` and `adamw` specify what they compute."""

    @property
    def quantize(self) -> Callable[[Tensor, QuantType, int, bool], PackedBytes]:
        """See `reference.quantize`."""

    @property
    def dequantize(self) -> Callable[[PackedBytes, torch.dtype], Tensor]:
        """See `reference.dequantize`."""

    @property
    def lora_project(self) -> Callable[[Tensor, Tensor, float, Tensor | None], Tensor]:
        """See `reference.lora_project`."""

    @property
    def linear_into(self) -> Callable[[Tensor, Tensor, Tensor, PackedBytes, Tensor | None, Tensor, float], None]:
        """See `reference.linear_into`."""

    @property
    def linear_backward(self) -> Callable[..., tuple[Tensor | None, Tensor, Tensor]]:
        """See `reference.linear_backward`."""

    @property
    def can_group(self) -> Callable[..., bool]:
        """Whether the backend computes the layers of several experts at once; then it has the next two functions."""

    @property
    def grouped_linear(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """See `reference.grouped_linear`."""

    @property
    def grouped_linear_backward(self) -> Callable[..., tuple[Tensor | None, Tensor, Tensor]]:
        """See `reference.grouped_linear_backward`."""

    @property
    def adamw_step(self) -> Callable[..., None]:
        """See `adamw.adamw_step`."""

    @property
    def adamw8bit_step(self) -> Callable[..., None]:
        """See `adamw.adamw8bit_step`."""


def backend(device: torch.device) -> Backend:
    """The backend module for a device: Triton's on a GPU or under TRITON_INTERPRET=1, else the eager one."""
    # ROCm devices are also named "cuda".
    if device.type == "cuda" or (INTERPRETED and device.type == "cpu"):
        return _triton(device) or eager
    return eager


def describe(device: torch.device) -> str:
    """What computes on a device, as a text for users: results of another one differ in their last bits."""
    if backend(device) is not eager:
        return "Triton kernels"
    return eager.path() if device.type == "cpu" else "plain torch"


@cache
def _triton(device: torch.device) -> Backend | None:
    """Triton's backend; None, with one warning, if a kernel does not run on the device."""
    try:
        kernels = import_module("lightning_qlora.kernels.triton")
        kernels.check_launch(device)
        return cast(Backend, kernels)
    except Exception as error:  # Triton, its compilers and the driver raise many types
        warnings.warn(
            f"Triton kernels do not run on {device} ({type(error).__name__}: {error}), so 4-bit layers run in eager "
            "PyTorch there. The results are the same, but a product takes several passes over memory. Install Triton "
            "(`pip install triton`, on Windows `triton-windows`) and a C compiler (or set the variable CC).",
            stacklevel=2,
        )
        return None
