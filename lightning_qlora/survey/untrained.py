"""Which parts of a module were never trained, while others were: heads and decoders beside what is pretrained.

A tensor that was never trained has one value everywhere, or is uniform in the bounds that torch, Xavier and Kaiming
compute from its shape, or normal with a standard deviation that initializations use. A step of a training moves values
beyond the bounds. A trained tensor may be as near to a normal one, so there what stands beside it decides too.

A part is a module without parts, or a parameter beside the parts of its module. What can't say it, as a norm or a layer
of few values, is what the block around it is.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import outer_names, owner_name
from lightning_qlora.quantization.blockwise import FLOATS
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.records import own_parameters
from lightning_qlora.tensors.values import can_be_read

BY_VALUES = "new: its values are those of an initialization"  # beginning of a reason
AS_THE_BLOCK = f"{BY_VALUES}, as those of the block around it"
SMALLEST = 0.1  # share of all values; a block with fewer does not make a module a pretrained one
FEWEST = 32  # values, of which a distribution can be asked
FEW = 256  # values; fewer are never certain
ALONE = 4096  # values of which a normal distribution needs no bias beside it
MOST = 1 << 18  # values that are looked at
STDS = (1.0, 0.1, 0.05, 0.02, 0.01, 0.001)  # that people write
OFF = 4.0  # standard deviations from what random values give, which one of 16,000 random tensors exceeds
MOVED = 1.1  # a bound times this: a few steps of a training move values so far
FULL = 0.002  # of 1,000 random biases 998 fill more of their bounds than this says


class Look(Enum):
    NEW = "of an initialization"
    LIKELY = "of one, as some trained tensors are"
    BLANK = "a vector with one value, as norms and biases begin"
    UNKNOWN = "nothing certain, or no values"
    TRAINED = "of none"


SAYING = (Look.TRAINED, Look.NEW, Look.LIKELY, Look.BLANK, Look.UNKNOWN)  # those that say more first


class _Part(NamedTuple):
    owner: str  # name of the module that holds it
    parameters: list[nn.Parameter]
    look: Look
    size: int  # how many values its largest matrix has
    text: str  # which initialization
    bias: Look | None  # of its bias, or of the weight of a norm; None: there is none

    @property
    def is_trained(self) -> bool:
        return Look.TRAINED in (self.look, self.bias)


class Untrained(NamedTuple):
    new: dict[int, str]  # id of a parameter -> which initialization it has
    is_pretrained: bool | None  # whether anything was trained; None: nothing is certain


@torch.no_grad()
def find_untrained(parts: Parts) -> Untrained:
    """The parameters that were never trained, in a module of which other parts were."""
    every = [*_parts(parts)]
    is_pretrained = _is_pretrained(every)
    if not is_pretrained:
        return Untrained({}, is_pretrained)
    new = {}
    for part in _new_parts(every):
        reason = f"{BY_VALUES}, {part.text}" if part.text else AS_THE_BLOCK
        new.update({id(parameter): reason for parameter in part.parameters})
    return Untrained(new, True)


def _is_pretrained(every: list[_Part]) -> bool | None:
    """Whether the module, or a block that holds a good share of its values, has more trained weights than new ones."""
    blocks = defaultdict[str, list[_Part]](list)
    for part in every:
        if part.look in (Look.TRAINED, Look.NEW, Look.LIKELY):
            for outer in outer_names(part.owner):
                blocks[outer].append(part)
    if any(not part.parameters for part in blocks[""]):  # converted layers, models of transformers
        return True
    smallest = SMALLEST * sum(part.size for part in blocks[""])
    for block in blocks.values():
        if sum(part.size for part in block) >= smallest and _trained(block) > max(len(block) / 2, 1):
            return True
    return False if _trained(blocks[""]) < len(blocks[""]) / 2 else None


def _trained(block: list[_Part]) -> int:
    return sum(part.look is Look.TRAINED for part in block)


def _new_parts(every: list[_Part]) -> Iterator[_Part]:
    blank = {part.owner for part in every if part.look is Look.BLANK}
    trained = {part.owner for part in every if part.is_trained}
    inside = defaultdict[str, set[bool]](set)  # name of a module -> whether parts in it are new, of those that say it
    unsaid = []
    for part in every:
        is_usual = part.owner in blank or part.bias is Look.NEW or part.size >= ALONE
        is_new = part.bias is Look.BLANK or (is_usual and part.owner not in trained)
        if part.is_trained or part.look is Look.NEW or (part.look is Look.LIKELY and is_new):
            for outer in outer_names(part.owner):
                inside[outer].add(not part.is_trained)
            if not part.is_trained:
                yield part
        else:
            unsaid.append(part)
    for part in unsaid:
        around = next((inside[outer] for outer in outer_names(part.owner) if inside[outer]), set())
        if around == {True} or (part.look is Look.BLANK and True in around):
            yield part._replace(text="")


def _parts(parts: Parts) -> Iterator[_Part]:
    of_models = {id(part) for modules in parts.models.values() for part in modules}  # of transformers
    for name, owner in parts.named:
        if isinstance(owner, LoRALayer) or id(owner) in of_models:  # others say where their values come from
            size = sum(parameter.numel() for parameter in owner._parameters.values() if parameter is not None)
            yield _Part(owner_name(name), [], Look.TRAINED, size, "", None)
            continue
        parameters = own_parameters(owner)
        if owner._modules:
            for parameter in parameters.values():
                yield _Part(name, [parameter], *_look(parameter, owner), None)
        elif parameters:
            weight = parameters.get("weight")
            if weight is not None and weight.ndim < 2:  # a norm
                is_trained = Look.TRAINED in [_look_of_bias(each, None) for each in parameters.values()]
                most: tuple[Look, int, str] = (Look.UNKNOWN, 0, "")
                bias: Look | None = Look.TRAINED
                if not is_trained:
                    most, bias = (Look.BLANK, 0, ""), None
            else:
                looks = [_look(each, owner) for each in parameters.values()]
                most = min(looks, key=lambda look: SAYING.index(look[0]))
                bias = None
                if weight is not None and most[0] is Look.LIKELY:
                    bias = _look_of_bias(parameters.get("bias"), weight)
            yield _Part(owner_name(name), [*parameters.values()], *most, bias)


def _look(tensor: Tensor, owner: nn.Module) -> tuple[Look, int, str]:
    """What the values of a parameter are, how many there are, and which initialization it is."""
    if tensor.dtype not in (*FLOATS, torch.float64) or not can_be_read(tensor):
        return Look.UNKNOWN, 0, ""
    size = tensor.numel() if tensor.ndim > 1 else 0
    values = tensor.detach().flatten()[:: -(-tensor.numel() // MOST) | 1].float()
    low, high = map(float, torch.aminmax(values))
    if low == high:
        return Look.NEW if size >= FEW else Look.BLANK, size, f"all {low:.3g}"
    values = values[values != 0]  # the row of a padding token, which would change the variance of a small table
    if size < FEWEST or not math.isfinite(high - low):
        return Look.UNKNOWN, size, ""
    count = len(values)
    variance = float(values.square().mean())
    kurtosis = float((values.square() / variance).square().mean())
    variances = _variances(tensor, owner)
    largest, rounding = max(-low, high), _rounding(tensor)
    look = Look.TRAINED if size >= FEW else Look.UNKNOWN
    if abs(kurtosis - 1.8) * math.sqrt(count) < OFF * 1.15:
        look = Look.UNKNOWN
        for bound in (math.sqrt(3 * each) for each in variances):
            if bound * (1 - 14 / count - rounding) < largest <= bound * (1 + rounding):
                return Look.NEW if size >= FEW else Look.LIKELY, size, f"uniform in +-{largest:.2g}"
            if size >= FEW and bound < largest < bound * MOVED:
                look = Look.TRAINED
    if abs(kurtosis - 3) * math.sqrt(count) < OFF * 4.9:
        look = Look.UNKNOWN
        for std in (*STDS, tensor.shape[-1] ** -0.5, *map(math.sqrt, variances)):
            if abs(math.sqrt(variance) / std - 1) * math.sqrt(2 * count) < OFF:
                return Look.LIKELY, size, f"normal with std {std:.2g}"
    return look, size, ""


def _look_of_bias(bias: Tensor | None, weight: Tensor | None) -> Look | None:
    """BLANK, or NEW if it is uniform as layers of torch begin, or TRAINED; None without one."""
    if bias is None or bias.dtype not in (*FLOATS, torch.float64) or not can_be_read(bias):
        return None
    low, high = map(float, torch.aminmax(bias.detach()))
    if low == high:
        return Look.BLANK
    bound = 0.0 if weight is None else math.prod(weight.shape[1:]) ** -0.5
    is_full = bound * FULL ** (1 / bias.numel()) <= max(-low, high) <= bound * (1 + _rounding(bias))
    return Look.NEW if is_full else Look.TRAINED


def _variances(weight: Tensor, owner: nn.Module) -> list[float]:
    """Those that initializations compute from a shape: torch's in its layers, LeCun's, Xavier's and Kaiming's."""
    inputs = math.prod(weight.shape[1:])
    outputs = weight.numel() // weight.shape[1]
    hidden = owner.hidden_size if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)) else inputs
    return [1 / 3 / inputs, 1 / 3 / hidden, 1 / inputs, 2 / inputs, 2 / (inputs + outputs), 1 / outputs, 2 / outputs]


def _rounding(tensor: Tensor) -> float:
    return 1e-6 if tensor.dtype in (torch.float32, torch.float64) else 2**-8
