"""Whether a tensor has the values of an initialization or of a training, by their distribution.

A tensor that was never trained has the distribution that it was drawn from: uniform, normal, constant, orthogonal. Few
steps of a training move values beyond the bounds of a uniform one. From normal a trained weight may be as near as a
random one, so there the rows and columns must be independent, and the standard deviation must be one that
initializations use; what stands beside it decides then (`untrained.py`). The moments of a sample tell most trained
weights; only what they leave open is asked of more values, or of all.
"""

import math
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qlora.quantization.blockwise import FLOATS
from lightning_qlora.tensors.values import can_be_read

READABLE = (*FLOATS, torch.float64)
FEWEST = 32  # values, of which a distribution can be asked
FEW = 256  # values; fewer are never certain
MANY = 2048  # values of which a uniform distribution is recognized without knowing its bound
ALONE = 4096  # values of which a uniform distribution is certain, and a normal one needs nothing beside it
WIDTH = 128  # columns of a sample
HEIGHT = 32  # its rows: neighbors in memory are read faster than other values
SECOND_HEIGHT = 128  # those of a second one, if the first is normal
HEAVY = (4, 12)  # kurtosis of many trained weights; that of a formula is smaller, that of an identity larger
ENOUGH = 1 << 18  # values for the bounds of a uniform distribution
ALL = 1 << 20  # for a standard deviation, which is then known to 0.07%

BEYOND = 1.03  # a bound times this: larger values are of another distribution, smaller ones of a training
OFF = 5.0  # standard deviations from what random values give, which one of 100,000 random tensors exceeds
STEPS = 3.5  # the same of a standard deviation, and one of 2,000

ROUND = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # standard deviations that people write
USUAL = (0.02, 0.01)  # those of transformers and of detectors


class Look(IntEnum):
    """What values are, those that say more after those that say less."""

    BLANK = 0  # a vector with one value, as norms and biases begin
    UNKNOWN = 1  # nothing certain, or no values
    SMALL = 2  # uniform as layers of torch begin, but few values
    LIKELY = 3  # as of an initialization, and as some trained tensors
    FRESH = 4  # of an initialization
    TRAINED = 5  # of none


class Values(NamedTuple):
    look: Look = Look.UNKNOWN
    size: int = 0  # how many values; 0 of a vector
    text: str = ""  # which initialization
    is_usual: bool = False  # whether it is LIKELY without anything beside it


class _Shape(NamedTuple):
    """Of a distribution, whatever its scale."""

    kurtosis: float
    noise: float  # standard deviation of the kurtosis of n values, times sqrt(n)


UNIFORM = _Shape(1.8, 1.15)
NORMAL = _Shape(3.0, 4.9)
CUT_NORMAL = _Shape(2.366, 1.96)  # at two standard deviations
LARGEST_OF_CUT = 2.274  # of its values, in standard deviations


class _Sample:
    """Some rows and columns of a matrix, and the moments of their values."""

    def __init__(self, data: Tensor, wanted: int) -> None:
        rows, columns = data.shape
        step = max(rows * min(columns, WIDTH) // (wanted * WIDTH), 1)
        some = data[::step, : max(WIDTH, wanted * WIDTH * step // rows)]
        self.matrix = np.ascontiguousarray(some.to("cpu", torch.float32).numpy())
        self.count = self.matrix.size
        with np.errstate(over="ignore", invalid="ignore"):  # of weights without values yet
            self.mean = float(self.matrix.sum()) / self.count
            self.squares = np.square(self.matrix - self.mean)
            total = float(self.squares.sum())
        self.deviation = math.sqrt(total / self.count)
        self.kurtosis = self.count * float(np.vdot(self.squares, self.squares)) / total**2 if total else math.nan

    def is_near(self, shape: _Shape) -> bool:
        return abs(self.kurtosis - shape.kurtosis) * math.sqrt(self.count) < OFF * shape.noise

    def spread(self) -> list[float]:
        """How many standard deviations the sizes of rows, and of columns, differ more than those of random values."""
        spread = []
        for axis, length in enumerate(self.squares.shape):
            sizes = self.squares.mean(axis) / self.deviation**2
            if length > 1 and len(sizes) > 1:
                ratio = float(np.vdot(sizes - 1, sizes - 1)) / (len(sizes) - 1) * length / (self.kurtosis - 1)
                spread.append((ratio - 1) / math.sqrt((2 + 12 / length) / (len(sizes) - 1)))
        return spread

    def alignment(self) -> float:
        """The same of the angles between rows, or between columns if these are fewer."""
        matrix = self.matrix if self.matrix.shape[0] <= self.matrix.shape[1] else self.matrix.T
        rows, columns = matrix.shape
        pairs = rows * (rows - 1)
        sizes = np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-30)
        products = matrix @ matrix.T / sizes / sizes.T
        energy = (float(np.vdot(products, products)) - rows) * columns
        return float(energy - pairs) / math.sqrt(4 * max(pairs, 1))


def values_of(tensor: Tensor, owner: nn.Module) -> Values:
    if tensor.dtype not in READABLE or not can_be_read(tensor):
        return Values()
    data = tensor.detach().squeeze()
    count = tensor.numel()
    if data.ndim < 2 and (tensor.ndim < 2 or tensor is not owner._parameters.get("weight")):
        low, high = _ends(data)
        return Values(Look.BLANK, 0, f"all {low:.3g}") if low == high else Values()
    data = data.reshape(1, -1) if data.ndim < 2 else data.flatten(1)
    sample = _Sample(data, HEIGHT)
    if sample.deviation <= 1e-6 * abs(sample.mean):
        low, high = _ends(data)
        if low == high:
            return Values(Look.FRESH if count >= FEW else Look.BLANK, count, f"all {low:.3g}")
    if count < FEWEST or not math.isfinite(sample.deviation):
        return Values()
    text = None
    if sample.is_near(UNIFORM):
        variances = _variances(tensor, owner)
        text = _uniform(data, variances if count >= FEW else variances[:2])  # few values are uniform in any bounds
    if text is not None and count < FEW:
        return Values(Look.SMALL, count, text)
    if text is not None and count >= ALONE:
        return Values(Look.FRESH, count, text)
    text = text or _cut_normal(sample)  # few steps may leave few values within their bounds
    if text is not None:
        return Values(Look.LIKELY, count, text, is_usual=True)
    if sample.is_near(NORMAL) and max(sample.spread(), default=0.0) < OFF:
        if count >= FEW and _look_of_rows(data if data.shape[0] <= data.shape[1] else data.T) is Look.FRESH:
            return Values(Look.FRESH, count, "orthogonal")
        wide = _Sample(data, SECOND_HEIGHT)
        off = [wide.mean / wide.deviation * math.sqrt(wide.count), wide.alignment(), *wide.spread()]
        if wide.is_near(NORMAL) and max(map(abs, off)) < OFF:
            return _by_deviation(tensor, owner, data)
    if count < FEW:
        return Values(size=count)
    is_heavy = HEAVY[0] < sample.kurtosis < HEAVY[1]
    return Values(Look.TRAINED if is_heavy else _look_of_rows(data), count, "orthogonal")


def look_of_bias(bias: Tensor | None, weight: Tensor, owner: nn.Module | None = None) -> Look | None:
    """BLANK, or SMALL if it is uniform as layers of torch begin, or UNKNOWN, as after a training; None without one.

    Of a norm without a bias, its weight.
    """
    if bias is None and weight.ndim < 2:
        bias = weight
    if bias is None or bias.dtype not in READABLE or not can_be_read(bias):
        return None
    bias = bias.detach()
    low, high = _ends(bias)
    if low == high:
        return Look.BLANK
    if weight.ndim < 2:
        return Look.UNKNOWN
    count = bias.numel()
    bound = _inputs(weight, owner) ** -0.5
    is_full = 0.002 ** (1 / count) <= max(-low, high) / bound <= 1 + _rounding(bias)  # of 1,000 random ones 998
    deviation = float(_norms(bias)) / math.sqrt(count)
    is_uniform = abs(deviation / bound * 3**0.5 - 1) < OFF * math.sqrt(0.2 / count)
    return Look.SMALL if is_full and is_uniform else Look.UNKNOWN


def _inputs(weight: Tensor, owner: nn.Module | None) -> int:
    """Of one output; of a Bilinear its first ones, as torch counts them."""
    return weight.shape[1] if isinstance(owner, nn.Bilinear) else math.prod(weight.shape[1:])


def _variances(weight: Tensor, owner: nn.Module) -> list[float]:
    """Those that initializations compute from a shape: torch's in its layers, LeCun's, Xavier's and Kaiming's."""
    inputs = _inputs(weight, owner)
    outputs = weight.numel() // weight.shape[1]
    hidden = owner.hidden_size if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)) else inputs
    return [1 / 3 / inputs, 1 / 3 / hidden, 1 / inputs, 2 / inputs, 2 / (inputs + outputs), 1 / outputs, 2 / outputs]


def _uniform(data: Tensor, variances: list[float]) -> str | None:
    """In which bounds values with the kurtosis of uniform ones are uniform; None if they are not."""
    data = data[:: -(-data.numel() // ENOUGH)]
    low, high = _ends(data)
    largest = max(-low, high)
    rounding = _rounding(data)
    bounds = [(3 * variance) ** 0.5 for variance in variances]
    near = [bound for bound in bounds if bound * (1 - 14 / data.numel() - rounding) < largest < bound * BEYOND]
    if near:
        is_uniform = any(largest <= bound * (1 + rounding) for bound in near)
    else:
        is_uniform = data.numel() >= MANY and _has_sharp_edges(data, low, high)
    if not is_uniform:
        return None
    if abs(low + high) < 0.02 * largest:
        return f"uniform in +-{largest:.2g}"
    return f"uniform in {low:.2g} to {high:.2g}"


def _has_sharp_edges(data: Tensor, low: float, high: float) -> bool:
    """Whether as many values are near the ends as elsewhere. A few steps of a training take them away from there."""
    edge = 0.01 * (high - low)
    count = int((data < low + edge).sum() + (data > high - edge).sum())
    expected = 0.02 * data.numel()
    return abs(count - expected) < OFF * math.sqrt(expected) + 100 * _rounding(data) * expected


def _ends(data: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(data)
    return float(low), float(high)


def _cut_normal(sample: _Sample) -> str | None:
    if sample.count < MANY or not sample.is_near(CUT_NORMAL):
        return None
    largest = float(np.abs(sample.matrix).max())
    if abs(largest / sample.deviation - LARGEST_OF_CUT) > OFF * 1.4 / math.sqrt(sample.count):
        return None
    return f"normal with std {largest / 2:.2g}, cut at two of them"


def _look_of_rows(data: Tensor) -> Look:
    """FRESH if they are orthogonal, UNKNOWN if they have one size, by a norm or a formula, else TRAINED."""
    error = 1e-3 + 4 * _rounding(data)
    some = data[:: -(-len(data) // 8)]
    sizes = [size for size in _norms(some, 1).tolist() if size > 0]
    if len(sizes) < 4 or max(sizes) - min(sizes) > error * max(sizes):
        return Look.TRAINED
    rows = F.normalize(data[:: -(-len(data) // 64)].float())
    angles = rows @ rows.T - torch.eye(len(rows), dtype=torch.float32, device=rows.device)
    return Look.FRESH if float(angles.abs().max()) < error else Look.UNKNOWN


def _norms(data: Tensor, dim: int | None = None) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(data, dim=dim, dtype=torch.promote_types(data.dtype, torch.float32))
    return norms


def _rounding(data: Tensor) -> float:
    return 1e-6 if data.dtype in (torch.float32, torch.float64) else 2**-8


def _by_deviation(weight: Tensor, owner: nn.Module, data: Tensor) -> Values:
    """Of normal and independent values."""
    usual = [*USUAL, *(variance**0.5 for variance in _variances(weight, owner))]
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)) or weight is not owner._parameters.get("weight"):
        usual += [1.0, weight.shape[-1] ** -0.5]
    others = [*ROUND, (2 / math.prod(weight.shape[1:])) ** 0.5]  # that of a convolution in groups
    count = weight.numel()
    sizes = _norms(data[:: -(-count // ALL)], 1)
    some = max(int(sizes.count_nonzero()), 1) * data.shape[1]  # the row of a padding token is zero
    deviation = float(sizes.norm()) / math.sqrt(some)
    fitting = [each for each in usual + others if abs(deviation / each - 1) * math.sqrt(2 * some) < STEPS]
    if not fitting:
        return Values(size=count)
    return Values(Look.LIKELY, count, f"normal with std {fitting[0]:.2g}", fitting[0] in usual and count >= ALONE)
