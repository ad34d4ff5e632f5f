"""Dropout whose mask is a function of the seed: the backward pass makes it again, nobody keeps it.

    out[i] = x[i] / (1 - p) where word[i] >= p * 2^32, else 0;   word = Philox 4x32-10, key seed, counter i // 4

The same mask in torch: `kernels/philox.py`.
"""

import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels import philox
from lightning_qlora.kernels.triton.tiles import launch_options


@triton.jit(do_not_specialize=["seed", "threshold"])
def _dropout_kernel(x, out, n, seed, threshold, scale, COUNTERS: tl.constexpr):
    """A program makes COUNTERS x 4 random words and treats as many elements."""
    counter = tl.program_id(0).to(tl.int64) * COUNTERS + tl.arange(0, COUNTERS)
    a, b, c, d = tl.randint4x(seed, counter)
    word = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (COUNTERS, 4)).to(tl.uint32, bitcast=True)
    i = counter[:, None] * 4 + tl.arange(0, 4)[None, :]
    values = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32) * scale
    values = tl.where(word >= threshold.to(tl.uint32), values, 0.0)
    tl.store(out + i, values.to(out.dtype.element_ty), mask=i < n)


def dropout(x: Tensor, p: float, seed: Tensor, out: Tensor) -> Tensor:
    """Write dropped x, contiguous and of any shape, to `out` (may be x itself), and return it."""
    n, tile = x.numel(), launch_options("dropout", x.device)
    _dropout_kernel[(triton.cdiv(n, 4 * tile["COUNTERS"]),)](
        x, out, n, int(seed), philox.threshold(p), 1 / (1 - p), enable_fp_fusion=False, **tile
    )
    return out
