"""Code to value: the 16 levels of NF4, FP4 and INT4 for weights, and the 256 dynamic levels for their scales."""

import itertools
import struct
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_qlora.checks import check_choice
from lightning_qlora.config import QuantType
from lightning_qlora.quantization.kept_memory import kept

# QLoRA paper, appendix E. Written out, because math libraries differ in the last bit; the formula is in the tests.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # one sign, two exponent and one mantissa bit, in their order
_INT4 = (7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0)  # symmetric, so two codes mean zero
_LEVELS = {
    "nf4": NF4_LEVELS,
    "fp4": tuple(level / 12 for level in (*_FP4, *(-level for level in _FP4))),
    "int4": tuple(level / 7 for level in (*_INT4, *(-level for level in reversed(_INT4)))),
}
OF_BITSANDBYTES = ("nf4", "fp4")  # the types that bitsandbytes quantizes to


class Codebook(NamedTuple):
    """Sixteen levels in [-1, 1], and what is needed to find the nearest one."""

    levels: Tensor  # level of each 4-bit code, fp32 [16]
    order: Tensor  # the codes sorted by level, uint8 [16]; if two codes mean zero, the lower code comes first
    bounds: Tensor  # midpoints between neighbouring levels, fp32 [15]; a value on a midpoint gets the lower level
    pairs: Tensor  # the two levels of each byte, stored as one int64, [256]
    in_order: bool  # whether each code is the rank of its level (NF4)


@cache
def codebook(quant_type: QuantType, device: torch.device | str = "cpu") -> Codebook:
    """The codebook of a 4-bit type, on a device; codes as in bitsandbytes (functional.py, get_4bit_type)."""
    if device != "cpu":
        *tables, in_order = codebook(quant_type)
        return kept(lambda: Codebook._make([*(table.to(device) for table in tables), in_order]), device)
    check_choice("quant_type", quant_type, tuple(_LEVELS))
    numbers = _LEVELS[quant_type]
    levels = torch.tensor(numbers, dtype=torch.float32, device="cpu")
    order = torch.tensor(sorted(range(16), key=numbers.__getitem__), device="cpu")
    ascending = levels[order]
    byte = torch.arange(256, device="cpu")
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
    return Codebook(
        levels=levels,
        order=order.to(torch.uint8),
        bounds=(ascending[:-1] + ascending[1:]) / 2,
        pairs=pairs.view(torch.int64).view(-1),
        in_order=torch.equal(ascending, levels),
    )


@cache
def dynamic_map(signed: bool = True, device: torch.device | str = "cpu") -> Tensor:
    """The 256 ascending levels of dynamic 8-bit quantization, fp32.

    There are seven decades; smaller values have fewer levels. Decade i, from 10^(i-6) / 10 to 10^(i-6), has the
    midpoints of 2^i equal steps for each sign (unsigned: of 2^(i+1) steps). Zero and one are added (Dettmers et al.
    2022, "8-bit optimizers via block-wise quantization", section 1.3; bitsandbytes functional.py, create_dynamic_map).
    """
    levels = [0.0, 1.0]
    for i in range(7):
        steps = 2**i
        if not signed:
            steps *= 2
        edges = _equal_steps(0.1, 1.0, steps)
        power = _fp32(10.0 ** (i - 6))
        for low, high in itertools.pairwise(edges):
            midpoint = _fp32(_fp32(low + high) / 2 * power)
            levels.append(midpoint)
            if signed:
                levels.append(-midpoint)
    return kept(lambda: torch.tensor(sorted(levels), dtype=torch.float32, device=device), device)


def _equal_steps(first: float, last: float, steps: int) -> list[float]:
    """As `torch.linspace` in fp32 on a processor with FMA: without it, torch's differ in the last bit."""
    first = _fp32(first)
    step = _fp32(_fp32(last - first) / steps)
    middle = (steps + 1) // 2
    edges = [first + step * i for i in range(middle)] + [last - step * (steps - i) for i in range(middle, steps + 1)]
    return [_fp32(edge) for edge in edges]


def _fp32(number: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", number))[0]
    return rounded
