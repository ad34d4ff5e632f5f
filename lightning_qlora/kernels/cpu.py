"""The CPU backend: the C loops where they could be built, else torch alone; the latter on any other device as well.

Compare `reference.py`: the same results. The weight is decoded into reused memory, or for a few rows of input not at
all. The adapter's product adds itself to the big one: a product that adds (beta = 1) is 5% slower than one that does
not, so the small one does.
"""

from functools import cache

import torch
from torch import Tensor

from lightning_qlora.config import QuantType
from lightning_qlora.kernels import eager, native
from lightning_qlora.kernels.adamw import adamw8bit_step as adamw8bit_step
from lightning_qlora.kernels.adamw import adamw_step as adamw_step
from lightning_qlora.kernels.native import Library
from lightning_qlora.kernels.reference import dropout_threshold
from lightning_qlora.kernels.scratch import scratch
from lightning_qlora.quantize.packed import PackedBytes


def path() -> str:
    """Which path the CPU takes, for people to read."""
    library = native.library()
    if library is not None:
        return f"compiled loops, {library.form}"
    return f"torch alone ({native.OFF} is set)" if native.is_off() else "torch alone (no compiled loops)"


def _library(x: Tensor) -> Library | None:
    library = native.library() if x.device.type == "cpu" else None
    return library if library is not None and x.dtype in library.types else None


def quantize(weight: Tensor, quant_type: QuantType, block_size: int, double_quant: bool) -> PackedBytes:
    """See `reference.quantize`."""
    library = _library(weight)
    return (eager if library is None else library).quantize(weight, quant_type, block_size, double_quant)


def dequantize_into(out: Tensor, weight: PackedBytes) -> Tensor:
    """Decode into `out`, flat [numel], of any of the three float types; returns it."""
    library = _library(out)
    return (eager if library is None else library).dequantize_into(out, weight)


def dequantize(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    """The decoded weight in fresh memory, [out, in]."""
    return dequantize_into(weight.packed.new_empty(weight.numel, dtype=dtype), weight).view(weight.shape)


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What `addmm` takes for a term that beta = 0 leaves out."""
    return torch.empty((), dtype=dtype, device=device)


def _decoded(weight: PackedBytes, dtype: torch.dtype) -> Tensor:
    return dequantize_into(scratch(weight.numel, dtype, weight.packed.device), weight).view(weight.shape)


def _dropout(out: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
    """See `reference.dropout`; into `out`, which may be x."""
    library = _library(x)
    return (eager if library is None else library).dropout_into(out, x, *dropout_threshold(p), int(seed))


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """x after dropout, valid until the next call; x itself without one."""
    if seed is None:
        return x
    x = x.contiguous()
    return _dropout(scratch(x.numel(), x.dtype, x.device, "dropped").view(x.shape), x, p, seed)


def linear(
    x: Tensor, weight: PackedBytes, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float, p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `reference.linear`."""
    dtype, library = x.dtype, _library(x)
    xa = torch.nn.functional.linear(_dropped(x, p, seed), lora_a.to(dtype))
    b, bias = lora_b.to(dtype).T, None if bias is None else bias.to(dtype)
    if library is not None and library.multiplies(len(x), weight, dtype):
        nothing = _nothing(dtype, x.device)
        y = torch.addmm(nothing if bias is None else bias, xa, b, beta=bias is not None, alpha=scaling)
        return library.add_matmul(y, x.contiguous(), weight), xa
    y = torch.nn.functional.linear(x, _decoded(weight, dtype), bias)
    # With rank 0 torch would still pass over y, to multiply it by one.
    return y.addmm_(xa, b, alpha=scaling) if b.numel() else y, xa


def linear_backward(
    grad: Tensor, x: Tensor, xa: Tensor, weight: PackedBytes, lora_a: Tensor, lora_b: Tensor, scaling: float,
    p: float, seed: Tensor | None, needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """See `reference.linear_backward`."""
    none = _nothing(grad.dtype, grad.device)
    grad_xa = torch.addmm(none, grad, lora_b.to(grad.dtype), beta=0, alpha=scaling)
    grad_b = torch.addmm(none, grad.T, xa, beta=0, alpha=scaling).to(lora_b.dtype)
    grad_a = torch.mm(grad_xa.T, _dropped(x, p, seed)).to(lora_a.dtype)
    if not needs_x:
        return None, grad_a, grad_b
    a, library = lora_a.to(grad.dtype), _library(x)
    few = library is not None and library.multiplies(len(x), weight, grad.dtype, transposed=True)
    if few or seed is not None:
        grad_x = torch.mm(grad_xa, a)
        if seed is not None:
            _dropout(grad_x, grad_x, p, seed)
        if few and library is not None:
            return library.add_matmul_transposed(grad_x, grad.contiguous(), weight), grad_a, grad_b
        return grad_x.addmm_(grad, _decoded(weight, grad.dtype)), grad_a, grad_b
    grad_x = torch.mm(grad, _decoded(weight, grad.dtype))
    return grad_x.addmm_(grad_xa, a) if a.numel() else grad_x, grad_a, grad_b
