"""Whether a tensor has the values of an initialization or of a training, by their distribution.

A tensor that was never trained has the distribution that it was drawn from: uniform, normal, constant, orthogonal. Few
steps of a training move values beyond the bounds of a uniform one, and a long one leaves nothing of it. From normal a
trained weight may be as near as a random one, so there the rows and columns must be independent, and the standard
deviation must be one that initializations use; what stands beside it decides then (`untrained.py`). A sample is asked
first, and all values only where it looks like an initialization.
"""

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_qlora.quantization.blockwise import FLOATS
from lightning_qlora.tensors.dtensor import is_sharded
from lightning_qlora.tensors.fingerprint import has_values, is_strided

FEWEST = 32  # values, of which a distribution can be asked
FEW = 256  # values; fewer are never certain
MANY = 2048  # values of which a uniform distribution is recognized without knowing its bound
ALONE = 4096  # values of which a uniform distribution is certain, and a normal one without a bias or a norm beside it
SIDE = 128  # rows and columns of a sample
ALL = 1 << 20  # values for a standard deviation, which is then known to 0.07%

EDGE = 0.01  # of the width of a uniform distribution: as many values are there
BEYOND = 1.03  # a bound times this: larger values are of another distribution, smaller ones of a training
LIMIT = 2.4  # Kolmogorov-Smirnov's distance times sqrt(n), which one of 50,000 random tensors exceeds
FAR = 3.0  # the same of a trained tensor
OFF = 4.5  # standard deviations from what random values give, which one of 100,000 random tensors exceeds
DEPENDENT = 6.0  # the same of a trained tensor
STEPS = 4.0  # the same of a standard deviation; 3 where nothing beside it says the same

ROUND = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)  # standard deviations that people write
USUAL = (0.02, 0.01)  # those of transformers and of detectors
WITHIN_TWO = math.erf(math.sqrt(2))  # the part of a normal distribution within two standard deviations


class Look(Enum):
    UNKNOWN = "nothing certain, or no values"
    BLANK = "a vector with one value, as norms and biases begin"
    SMALL = "uniform as layers of torch begin, but few values"
    LIKELY = "as of an initialization, and as some trained tensors"
    FRESH = "of an initialization"
    TRAINED = "of no initialization"


class Values(NamedTuple):
    look: Look = Look.UNKNOWN
    text: str = ""  # which initialization
    size: int = 0  # how many values; 0 of a vector
    is_usual: bool = False  # whether it is LIKELY without anything beside it


class _Sample(NamedTuple):
    matrix: Tensor  # some rows and columns, in fp32; a vector is one row
    ordered: Tensor  # its values

    def distance(self, distribution: Callable[[Tensor], Tensor]) -> float:
        """Kolmogorov-Smirnov's distance from a cumulative distribution, times sqrt(n); at some values if it is FAR."""
        some = _distance(self.ordered, distribution, 1 + len(self.ordered) // 256)
        return some if some > FAR else _distance(self.ordered, distribution, 1)


def _distance(ordered: Tensor, distribution: Callable[[Tensor], Tensor], step: int) -> float:
    count = len(ordered)
    share = distribution(ordered[::step])
    below = torch.arange(0, count, step, device="cpu") / count
    return float(torch.maximum(share - below, below + 1 / count - share).max()) * math.sqrt(count)


@torch.no_grad()
def values_of(tensor: Tensor, owner: nn.Module) -> Values:
    """What the values of a parameter of a module say."""
    if not can_be_read(tensor):
        return Values()
    data = tensor.detach().squeeze()
    is_vector = tensor.ndim < 2 or (data.ndim < 2 and tensor is not owner._parameters.get("weight"))
    data = data.reshape(1, -1) if data.ndim < 2 else data.flatten(1)
    sample = _sample(data)
    low, high = sample.ordered[[0, -1]].tolist()
    count = tensor.numel()
    if low == high:
        low, high = _ends(data)
    if low == high:
        look = Look.BLANK if is_vector or count < FEW else Look.FRESH
        return Values(look, f"all {low:.3g}", 0 if is_vector else count)
    if is_vector or count < FEWEST or not math.isfinite(high - low):
        return Values()
    text = _uniform(data, sample, _bounds(tensor, owner)) or _sparse(sample)
    if text is not None and count < FEW:
        return Values(Look.SMALL, text, count)
    if text is not None and count >= ALONE:
        return Values(Look.FRESH, text, count)
    text = text or _cut_normal(sample)  # few steps may leave few values within their bounds
    if text is not None:
        return Values(Look.LIKELY, text, count, is_usual=True)
    return _normal_or_trained(tensor, owner, data, sample)


def can_be_read(tensor: Tensor) -> bool:
    is_plain = is_strided(tensor) and not is_sharded(tensor)
    return tensor.dtype in (*FLOATS, torch.float64) and tensor.numel() > 0 and has_values(tensor) and is_plain


def look_of_bias(bias: Tensor | None, weight: Tensor) -> Look | None:
    """BLANK, or SMALL if it is uniform as layers of torch begin, or UNKNOWN, as after a training; None without one.

    Of a norm without a bias, its weight.
    """
    if bias is None and weight.ndim == 1:
        bias = weight
    if bias is None or not can_be_read(bias):
        return None
    values = bias.detach().reshape(1, -1)
    low, high = _ends(values)
    bound = _fans(weight)[0] ** -0.5
    if low == high:
        return Look.BLANK
    if weight.ndim == 1:
        return Look.UNKNOWN
    if bias.numel() < FEWEST:
        is_uniform = 0.01 ** (1 / bias.numel()) * bound <= max(-low, high) <= bound  # of 100 random ones 99
    else:
        is_uniform = _uniform(values, _sample(values), [bound]) is not None
    return Look.SMALL if is_uniform else Look.UNKNOWN


def _sample(data: Tensor) -> _Sample:
    rows, columns = data.shape
    size = SIDE * SIDE
    some = max(SIDE, size // columns)
    data = data[:: -(-rows // some)]
    some = min(columns, max(SIDE, size // len(data)))
    places = torch.linspace(0, columns - 1, some, dtype=torch.float32, device=data.device)
    matrix = data[:, places.long()].float().cpu()  # uneven steps, and none of a kernel's width
    in_use = matrix.any(1)  # the row of a padding token is zero
    if in_use.any():
        matrix = matrix[in_use]
    return _Sample(matrix, torch.from_numpy(np.sort(matrix.flatten().numpy())))


def _fans(weight: Tensor) -> tuple[int, int]:
    """Numbers of inputs and outputs, as torch.nn.init counts them."""
    if weight.ndim < 2:
        return weight.numel(), weight.numel()
    receptive = weight[0][0].numel()
    return weight.shape[1] * receptive, weight.shape[0] * receptive


def _bounds(weight: Tensor, owner: nn.Module) -> list[float]:
    """Bounds of uniform distributions: of torch's layers; and, where few values need no other test, all known ones."""
    inputs = _fans(weight)[0]
    hidden = getattr(owner, "hidden_size", inputs) if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)) else inputs
    bounds = [inputs**-0.5, hidden**-0.5]
    if weight.numel() >= FEW:
        bounds += [(3 * variance) ** 0.5 for variance in _variances(weight)]
    return bounds


def _variances(weight: Tensor) -> list[float]:
    """Those that initializations compute from a shape: LeCun's, Xavier's and Kaiming's."""
    inputs, outputs = _fans(weight)
    return [1 / inputs, 2 / inputs, 2 / (inputs + outputs), 1 / outputs, 2 / outputs]


def _uniform(data: Tensor, sample: _Sample, bounds: Sequence[float]) -> str | None:
    """In which bounds the values are uniform; None if they are not."""
    of_16_bits = 0 if _is_exact(data) else 0.0025 * math.sqrt(len(sample.ordered))  # by rounding
    if _distance_from_uniform(sample, *sample.ordered[[0, -1]].tolist()) > LIMIT + of_16_bits:
        return None
    low, high = _ends(data)
    largest = max(-low, high)
    rounding = 1e-6 if _is_exact(data) else 2**-8
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


def _distance_from_uniform(sample: _Sample, low: float, high: float) -> float:
    if abs(low + high) < 0.02 * high:
        high = max(-low, high)
        low = -high
    margin = (high - low) / len(sample.ordered)
    return sample.distance(lambda x: (x - low + margin / 2) / (high - low + margin))


def _has_sharp_edges(data: Tensor, low: float, high: float) -> bool:
    """Whether as many values are near the ends as elsewhere. A few steps of a training take them away from there."""
    data = data[:: -(-data.numel() // ALL)]
    edge = EDGE * (high - low)
    count = int((data < low + edge).sum() + (data > high - edge).sum())
    expected = 2 * EDGE * data.numel()
    return abs(count - expected) < OFF * math.sqrt(expected) + (0 if _is_exact(data) else 0.4 * expected)


def _ends(data: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(data)
    return float(low), float(high)


def _cut_normal(sample: _Sample) -> str | None:
    if len(sample.ordered) < MANY:
        return None
    largest = float(sample.ordered.abs().max())
    if sample.distance(lambda x: 0.5 + torch.erf(math.sqrt(2) * x / largest) / (2 * WITHIN_TWO)) > LIMIT:
        return None
    return f"normal with std {largest / 2:.2g}, cut at two of them"


def _sparse(sample: _Sample) -> str | None:
    """An identity, or one in each channel (`nn.init.dirac_`)."""
    if float(sample.ordered[len(sample.ordered) // 2]) != 0 or len(sample.ordered) < MANY:
        return None
    values = sample.ordered[sample.ordered != 0]
    if bool((values == values[0]).all()):
        return f"zeros and {float(values[0]):.2g}"
    return None


def _is_orthogonal(data: Tensor) -> bool:
    if data.shape[0] > data.shape[1]:
        data = data.T
    if not _has_equal_rows(data):
        return False
    rows = _units(data[:: -(-len(data) // 64)].float())
    error = 1e-3 if _is_exact(data) else 2e-2
    return (
        len(rows) > 3
        and float((rows @ rows.T - torch.eye(len(rows), dtype=torch.float32, device=rows.device)).abs().max()) < error
    )


def _has_equal_rows(data: Tensor) -> bool:
    """Whether some rows have the same size: they are orthogonal, normalized, or follow a formula."""
    sizes = data[:: -(-len(data) // 8)].float().norm(dim=1)
    sizes = sizes[sizes > 0]
    return len(sizes) > 3 and float(sizes.max() - sizes.min()) < (1e-3 if _is_exact(data) else 2e-2) * float(
        sizes.max()
    )


def _units(rows: Tensor) -> Tensor:
    sizes: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / sizes.clamp_min(1e-30)


def _is_exact(data: Tensor) -> bool:
    return data.dtype in (torch.float32, torch.float64)


def _normal_or_trained(weight: Tensor, owner: nn.Module, data: Tensor, sample: _Sample) -> Values:
    deviation = float(sample.matrix.square().mean().sqrt())
    distance = sample.distance(lambda x: 0.5 * (1 + torch.erf(x / deviation / math.sqrt(2))))
    count = weight.numel()
    trained = Values(Look.TRAINED if count >= FEW and not _has_equal_rows(data) else Look.UNKNOWN, size=count)
    if distance > FAR:
        return trained
    mean = abs(float(sample.matrix.mean())) / deviation * math.sqrt(len(sample.ordered))
    more, less = _dependence(sample.matrix)
    if more < DEPENDENT and count >= FEW and _is_orthogonal(data):
        return Values(Look.FRESH, "orthogonal", count)
    off = max(mean, more, less)
    if off > DEPENDENT:
        return trained
    if distance > LIMIT or off > OFF:
        return Values(size=count)
    known = _deviations(weight, owner)
    data = data[:: -(-count // ALL)]
    data = data[data.any(1)]
    exact = float(torch.linalg.vector_norm(data, dtype=torch.float32)) / math.sqrt(data.numel())
    near = min(known, key=lambda each: abs(exact / each - 1))
    steps = abs(exact / near - 1) * math.sqrt(2 * data.numel())
    if steps > STEPS:
        return Values(size=count)
    return Values(Look.LIKELY, f"normal with std {near:.2g}", count, known[near] and count >= ALONE and steps < 3)


def _deviations(weight: Tensor, owner: nn.Module) -> dict[float, bool]:
    """Standard deviations of initializations -> whether they are usual for such a layer."""
    usual = [*USUAL, *(variance**0.5 for variance in _variances(weight))]
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        usual += [1.0, weight.shape[-1] ** -0.5]
    others = [*ROUND, (2 / weight[0][0].numel()) ** 0.5]  # that of a convolution in groups
    return dict.fromkeys(others, False) | dict.fromkeys(usual, True)


def _dependence(matrix: Tensor) -> tuple[float, float]:
    """How many standard deviations sizes of rows and columns, and angles between rows, are from independent values.

    The largest that is more than of those, and the largest that is less.
    """
    squares = matrix.square()
    kurtosis = float(squares.square().mean() / squares.mean() ** 2)
    off = [0.0]
    for sizes, length in ((squares.mean(1), matrix.shape[1]), (squares.mean(0), matrix.shape[0])):
        if length > 1 and len(sizes) > 1 and kurtosis > 1:
            ratio = float((sizes / sizes.mean()).var()) * length / (kurtosis - 1)
            off.append((ratio - 1) / math.sqrt((2 + 12 / length) / (len(sizes) - 1)))
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    rows, columns = matrix.shape
    if rows > 1:
        units = _units(matrix)
        pairs = rows * (rows - 1)
        energy = float((units @ units.T).square().sum() - rows) / pairs * columns
        off.append((energy - 1) * math.sqrt(pairs / 4))
    return max(off), -min(off)
