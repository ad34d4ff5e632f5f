"""Dropout whose mask is a function of the seed: the backward pass makes it again, nobody keeps it.

    out[i] = x[i] / (1 - p) where word[i] >= p * 2^32, else 0;       word[i] = mix(mix(i + seed_low) ^ seed_high)

It is the mask of `reference.dropout`, bit for bit, so a run drops the same elements on every device.
"""

import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.reference import as_int32, dropout_threshold
from lightning_qlora.kernels.triton.tiles import launch_options


@triton.jit
def _mix(h):
    """The hash of 32 bits in `reference`."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit(do_not_specialize=["low", "high", "least_kept"])
def _dropout_kernel(x, out, n, low, high, least_kept, scale, SIZE: tl.constexpr):
    """A program treats SIZE elements."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    place = i.to(tl.uint32)
    word = _mix(_mix(place + low.to(tl.uint32)) ^ high.to(tl.uint32)).to(tl.int32, bitcast=True)
    values = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32) * scale
    tl.store(out + i, tl.where(word >= least_kept, values, 0.0).to(out.dtype.element_ty), mask=i < n)


def dropout(x: Tensor, p: float, seed: Tensor, out: Tensor) -> Tensor:
    """Write dropped x, contiguous and of any shape, to `out` (may be x itself), and return it."""
    n, tile, key = x.numel(), launch_options("dropout", x.device), int(seed)
    least_kept, scale = dropout_threshold(p)
    _dropout_kernel[(triton.cdiv(n, tile["SIZE"]),)](
        x, out, n, as_int32(key), as_int32(key >> 32), least_kept, scale, enable_fp_fusion=False, **tile
    )
    return out
