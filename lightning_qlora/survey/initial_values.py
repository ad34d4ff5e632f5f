"""Whether a tensor has the values of an initialization or of a training, by their distribution.

A tensor that was never trained has the distribution that it was drawn from: uniform, normal, constant, orthogonal. A
trained weight is far from uniform. From normal it may be as near as a random one, so there the rows and columns must be
independent, and the standard deviation must be one that initializations use; what stands beside it decides then
(`untrained.py`). Constants: tests/survey/test_initial_values.py and the prototype that docs/design.md names.
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
ALONE = 4096  # values of which a normal distribution is certain without a bias or a norm beside it
SIDE = 128  # rows and columns of a sample
ALL = 1 << 20  # values for a standard deviation, which is then known to 0.07%

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
    LIKELY = "normal, with a standard deviation of initializations"
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
        """Kolmogorov-Smirnov's distance from a cumulative distribution, times sqrt(n)."""
        count = len(self.ordered)
        steps = torch.arange(count + 1, device="cpu") / count
        share = distribution(self.ordered)
        distance = torch.maximum((steps[1:] - share).max(), (share - steps[:-1]).max())
        return float(distance) * math.sqrt(count)


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
        look = Look.BLANK if is_vector or count < FEW else Look.FRESH
        return Values(look, f"all {low:.3g}", 0 if is_vector else count)
    if is_vector or count < FEWEST or not math.isfinite(high - low):
        return Values()
    text = _uniform(sample, _bounds(tensor, owner))
    if text is None and count >= MANY:
        text = _cut_normal(sample) or _sparse(sample)
    if text is not None:
        return Values(Look.SMALL if count < FEW else Look.FRESH, text, count)
    return _normal_or_trained(tensor, owner, data, sample)


def can_be_read(tensor: Tensor) -> bool:
    is_plain = is_strided(tensor) and not is_sharded(tensor)
    return tensor.dtype in (*FLOATS, torch.float64) and tensor.numel() > 0 and has_values(tensor) and is_plain


def fits_beside(bias: Tensor | None, weight: Tensor) -> bool | None:
    """Whether a bias was not trained: it is constant, or uniform as layers of torch begin; None if there is none."""
    if bias is None or not can_be_read(bias):
        return None
    largest, smallest = float(bias.detach().max()), float(bias.detach().min())
    if largest == smallest:
        return True
    text = _uniform(_sample(bias.detach().reshape(1, -1)), [_fans(weight)[0] ** -0.5])
    return text is not None or (bias.numel() < FEWEST and max(largest, -smallest) <= _fans(weight)[0] ** -0.5)


def _sample(data: Tensor) -> _Sample:
    rows, columns = data.shape
    size = SIDE * SIDE
    some = max(SIDE, size // columns)
    data = data[:: -(-rows // some)]
    some = min(columns, max(SIDE, size // len(data)))
    places = torch.linspace(0, columns - 1, some, device=data.device).long()  # uneven: no step of a kernel's width
    matrix = data[:, places].float().cpu()
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


def _uniform(sample: _Sample, bounds: Sequence[float]) -> str | None:
    """In which bounds the values are uniform; None if they are not."""
    low, high = sample.ordered[[0, -1]].tolist()
    count = len(sample.ordered)
    largest = max(-low, high)
    if count < MANY:
        near = [bound for bound in bounds if bound * (1 - 14 / count) <= largest <= bound * 1.004]
        if not near:
            return None
        largest = near[0]
    if count < MANY or abs(low + high) < 0.02 * largest:
        low, high = -largest, largest
    middle = (low + high) / 2
    half = (high - low) / 2 * (1 + 1 / count)
    of_16_bits = 0.0025 * count  # values that rounding to 16 bits may move over a place
    if sample.distance(lambda x: ((x - middle) / half + 1) / 2) > LIMIT + of_16_bits / math.sqrt(count):
        return None
    at_edge = int(((sample.ordered - middle).abs() > 0.95 * half).sum())
    if abs(at_edge - 0.05 * count) > OFF * math.sqrt(0.05 * 0.95 * count) + 2 * of_16_bits:
        return None
    if low == -high:
        return f"uniform in +-{high:.2g}"
    return f"uniform in {low:.2g} to {high:.2g}"


def _cut_normal(sample: _Sample) -> str | None:
    largest = float(sample.ordered.abs().max())
    if sample.distance(lambda x: 0.5 + torch.erf(math.sqrt(2) * x / largest) / (2 * WITHIN_TWO)) > LIMIT:
        return None
    return f"normal with std {largest / 2:.2g}, cut at two of them"


def _sparse(sample: _Sample) -> str | None:
    """An identity, or one in each channel (`nn.init.dirac_`)."""
    values = sample.ordered[sample.ordered != 0]
    if 2 * len(values) < len(sample.ordered) and bool((values == values[0]).all()):
        return f"zeros and {float(values[0]):.2g}"
    return None


def _angles(data: Tensor) -> Tensor | None:
    """The cosines of angles between rows of equal sizes; None if their sizes differ."""
    rows = data[:: -(-len(data) // 64)].float()
    rows = rows[rows.abs().sum(1) > 0]
    norms = rows.norm(dim=1)
    if len(rows) < 4 or float(norms.max() - norms.min()) > _error(data) * float(norms.max()):
        return None
    rows = rows / norms[:, None]
    angles: Tensor = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    return angles


def _error(data: Tensor) -> float:
    return 1e-3 if data.dtype in (torch.float32, torch.float64) else 2e-2


def _is_orthogonal(data: Tensor) -> bool:
    angles = _angles(data.T if data.shape[0] > data.shape[1] else data)
    return angles is not None and float(angles.abs().max()) < _error(data)


def _normal_or_trained(weight: Tensor, owner: nn.Module, data: Tensor, sample: _Sample) -> Values:
    deviation = float(sample.matrix.square().mean().sqrt())
    distance = sample.distance(lambda x: 0.5 * (1 + torch.erf(x / deviation / math.sqrt(2))))
    mean = abs(float(sample.matrix.mean())) / deviation * math.sqrt(len(sample.ordered))
    more, less = _dependence(sample.matrix)
    count = weight.numel()
    if distance < FAR and more < DEPENDENT and count >= FEW and _is_orthogonal(data):
        return Values(Look.FRESH, "orthogonal", count)
    off = max(mean, more, less)
    if distance > LIMIT or off > OFF:
        is_trained = count >= FEW and (distance > FAR or off > DEPENDENT)
        if is_trained and _angles(data) is None:  # else by a formula, or normalized
            return Values(Look.TRAINED, size=count)
        return Values(size=count)
    known = _deviations(weight, owner)
    data = data[:: -(-count // ALL)]
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
        units = matrix / matrix.norm(dim=1, keepdim=True).clamp_min(1e-30)
        pairs = rows * (rows - 1)
        energy = float((units @ units.T).square().sum() - rows) / pairs * columns
        off.append((energy - 1) * math.sqrt(pairs / 4))
    return max(off), -min(off)
