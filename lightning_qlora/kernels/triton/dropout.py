"""Dropout from a seed, as a launch of its own and inside of products.

    out[i] = x[i] / (1 - p) if hash[i] >= p * 2^32 else 0;       hash[i] = mix(mix(i + seed_low) ^ seed_high)

The mask is that of `reference.dropout`, bit for bit, so a run drops the same elements on every device. It is a function
of the seed: the backward pass computes it again, and nothing stores it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.reference import as_int32, dropout_threshold
from lightning_qlora.kernels.scratch import is_capturing
from lightning_qlora.kernels.triton.launch import find_tile, launch_of

MASK = ["low", "high", "least_kept"]  # arguments that differ in every call
NO_DROPOUT = 0, 0, 0, 1.0


@triton.jit
def _mix(h):
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def is_kept(i, low, high, least_kept):
    """Whether the elements with the flat indices i are kept; low and high are the halves of the seed."""
    word = _mix(_mix(i.to(tl.uint32) + low.to(tl.uint32)) ^ high.to(tl.uint32))
    return word.to(tl.int32, bitcast=True) >= least_kept


@triton.jit(do_not_specialize=MASK)
def _dropout_kernel(x, out, n, low, high, least_kept, scale, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    values = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32) * scale
    tl.store(out + i, tl.where(is_kept(i, low, high, least_kept), values, 0.0).to(out.dtype.element_ty), mask=i < n)


def dropout_arguments(p: float, seed: Tensor | None, device: torch.device) -> tuple[int, int, int, float]:
    """What the kernels take: the halves of the seed, the smallest hash, and the factor 1 / (1 - p)."""
    if seed is None:
        return NO_DROPOUT
    if is_capturing(device):
        raise RuntimeError(
            "lora_dropout cannot be captured in a CUDA graph: every replay would drop the same inputs. Set "
            "lora_dropout=0, or call eval() first."
        )
    number = int(seed.item())
    return as_int32(number), as_int32(number >> 32), *dropout_threshold(p)


def dropout_into(out: Tensor, x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Write dropped x, contiguous and of any shape, to `out`, which may be x; returns `out`."""
    *mask, scale = dropout_arguments(p, seed, x.device)
    n = x.numel()
    tile = find_tile("dropout", x.device)
    run = launch_of((x.dtype,), _dropout_kernel, x.device, (-(-n // tile["SIZE"]), 1, 1), (n,), tile)
    run((x, out), (*mask, scale))
    return out
