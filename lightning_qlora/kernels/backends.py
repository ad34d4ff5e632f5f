"""Which module computes the ops on a device, and what such a module offers."""

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels import cpu
from lightning_qlora.quantize.packed import PackedBytes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as Triton does


class Backend(Protocol):
    """What a backend module offers; the functions of `reference` say what each computes."""

    @property
    def quantize(self) -> Callable[[Tensor, QuantType, int, bool], PackedBytes]:
        """See `reference.quantize`."""

    @property
    def dequantize(self) -> Callable[[PackedBytes, torch.dtype], Tensor]:
        """See `reference.dequantize`."""

    @property
    def linear(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """See `reference.linear`."""

    @property
    def linear_backward(self) -> Callable[..., tuple[Tensor | None, Tensor, Tensor]]:
        """See `reference.linear_backward`."""

    @property
    def adamw_step(self) -> Callable[..., None]:
        """See `adamw.adamw_step`."""

    @property
    def adamw8bit_step(self) -> Callable[..., None]:
        """See `adamw.adamw8bit_step`."""


def backend(device: torch.device) -> Backend:
    """The backend module for a device: Triton's on a GPU or under TRITON_INTERPRET=1, else the eager one."""
    # ROCm's devices call themselves "cuda" as well.
    if device.type == "cuda" or (INTERPRETED and device.type == "cpu"):
        return _triton() or cpu
    return cpu


@cache
def _triton() -> Backend | None:
    try:
        return cast(Backend, import_module("lightning_qlora.kernels.triton"))
    except ImportError as error:  # it is not installed, or it is broken: an importable name says nothing about either
        warnings.warn(
            f"Triton cannot be imported ({error}), so the 4-bit layers run in eager PyTorch on this GPU: the results "
            "are right, but each product costs several passes over memory. `pip install triton` (Linux) or "
            "`triton-windows` mends it.",
            stacklevel=2,
        )
        return None
