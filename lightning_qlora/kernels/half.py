"""Half: a matrix in fp16 with powers of two beside it, whose products neither overflow nor lose small values.

    x = 2^e values          the largest magnitude of `values`, or of each row, is from 2^13 to 2^14
    x W^T = 2^e 2^f (values_x values_W^T)          fp16 times fp16, summed in fp32, and the powers taken out there

A card without bf16 has tensor cores for fp16, whose numbers begin at 6e-8 and end at 65504. Activations can be larger,
and gradients are smaller. With the power of two of the largest value, values that are up to 2^28 times smaller have 11
bits (bf16 has 8), and those up to 2^38 times smaller have fewer. So nothing overflows, and a loss needs no scale. The
power changes no digit, and the host does not wait for it. NaN and Inf stay what and where they are, because only finite
values decide about the power.

If each row has its own power, a cast takes one pass over memory, and a row does not depend on the others. A product
that sums over rows first multiplies its other factor by these powers, and casts that factor then.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_qlora.quantization.packed_weight import PackedBytes, aligned

MIDDLE = 13  # the largest magnitude becomes 2^MIDDLE to 2^(MIDDLE + 1): sums of scales and roundings stay below 65504
BIAS = 127  # of the exponent in an fp32 number, which begins at bit 23
MANTISSA = 23


class Half(NamedTuple):
    """A matrix: fp16 values times a power of two, or one for each row."""

    values: Tensor  # fp16 [m, n]
    factor: Tensor  # fp32 [1] or [m, 1], on the device of the values; transposed [1, m]
    dropped: Any = None  # its dropout, a `Half` with the same values and zeros, and factors divided by 1 - p

    @property
    def T(self) -> "Half":
        """The transposed matrix, without a copy."""
        return Half(self.values.mT, self.factor.t())

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix, and of its products."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to_fp32(self) -> Tensor:
        return self.values.float() * self.factor


class Wide(NamedTuple):
    """A matrix in fp32, and its cast to bf16, which the first product writes and all multiply."""

    values: Tensor
    cast: Tensor


def to_half(x: Tensor) -> Half:
    """Round a matrix of any float type to fp16 with the power of two of its largest finite value."""
    return Half(*scaled(x, torch.float16))


def rows_to_half(x: Tensor, times: Tensor | None = None) -> Half:
    """The same for each row of a matrix, whose columns are multiplied by `times`, [n] or [1], before."""
    x = x.float()
    return Half(*scaled(x if times is None else x * times.view(1, -1), torch.float16, by_row=True))


def scaled(x: Tensor, dtype: torch.dtype, by_row: bool = False) -> tuple[Tensor, Tensor]:
    """x 2^-e in a type, and 2^e, fp32 [1] or [m, 1]; a result of fp32 is exact."""
    x = x.float()
    # From the bits of an fp32 number, since a logarithm is rounded. Numbers below 2^-126 have the exponent 0.
    exponent = (_largest(x, by_row).view(torch.int32) >> MANTISSA).sub_(MIDDLE).clamp_(min=1)
    inverse = ((2 * BIAS - exponent) << MANTISSA).view(torch.float32)
    return (x * inverse).to(dtype), (exponent << MANTISSA).view(torch.float32)


def _largest(x: Tensor, by_row: bool) -> Tensor:
    """The largest finite magnitude, [1], or of each row, [m, 1]; 0 if there is none."""
    shape = (x.shape[0], 1) if by_row else (1,)
    if not x.numel():
        return x.new_zeros(shape)
    magnitudes = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).abs()
    return (magnitudes.amax(1) if by_row else magnitudes.amax()).view(shape)


def scaled_weight(weight: PackedBytes, scale: Any = scaled) -> tuple[PackedBytes, Tensor]:
    """A 4-bit weight whose scales are divided by a power of two, so that it decodes to fp16, and the power, fp32 [1].

    A weight with scales above 65504, or below the numbers of fp16, needs it. The power is that of the largest scale. Of
    scales in 8 bits it is that of the second-level scales and the offset: a scale is at most twice the largest of them.
    `scale` is the backend's `scaled`.
    """
    stored = weight.nested if weight.nested.numel() else weight.absmax
    scales, factor = scale(aligned(stored).view(-1).view(torch.float32), torch.float32)
    divided = scales.view(torch.uint8).view(stored.shape)
    if weight.nested.numel():
        return weight._replace(nested=divided), factor
    return weight._replace(absmax=divided), factor


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of fp16 matrices in fp32, without a rounding to fp16 between.

    `torch.addmm` with another output type gives wrong results (pytorch issue 154086), so nothing is added here.
    """
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    if not a.shape[1]:
        return out.zero_()
    if a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a.float(), b.float(), out=out)  # the products of fp16 numbers are exact in fp32


def take_out(sums: Tensor, rows: Tensor | None, columns: Tensor | None, s: float = 1.0) -> Tensor:
    """Multiply sums in place by the powers of two of their rows, [m, 1] or [1], and columns, [1, n] or [1], and by s.

    The smaller one comes first, so that only the result can overflow.
    """
    if rows is None or columns is None:
        powers = [power for power in (rows, columns) if power is not None]
    else:
        powers = [torch.minimum(rows, columns), torch.maximum(rows, columns)]
    for power in powers:
        sums.mul_(power)
    return sums if s == 1.0 else sums.mul_(s)
