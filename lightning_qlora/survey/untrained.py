"""Which parts of a module were never trained, while others were: heads and decoders beside what is pretrained.

Each tensor says by its values what it is (`initial_values.py`). A part is a module without parts, or a parameter beside
the parts of its module. What can't say it, as a norm or a layer of few values, is what the block around it is.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import outer_names, owner_name
from lightning_qlora.survey.initial_values import FEW, Look, Values, look_of_bias, values_of
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.records import BY_VALUES, INITIAL, ORIGINS, PRETRAINED, own_parameters

AS_THE_BLOCK = f"{BY_VALUES}, as those of the block around it"
FEW_PRETRAINED = 0.1  # of the parts, or of their values: up to here all is taken for new


class Untrained(NamedTuple):
    new: dict[int, str]  # id of a parameter -> which initialization it has
    is_pretrained: bool | None  # whether anything was trained; None: nothing is certain


class _Part(NamedTuple):
    owner: str  # name of the module that holds it
    parameters: list[nn.Parameter]
    values: Values  # those that say most
    bias: Look | None  # of its bias, or of the weight of a norm without one; None: there is none, or it is not asked

    @property
    def is_trained(self) -> bool:
        return self.values.look is Look.TRAINED or self.bias is Look.UNKNOWN

    @property
    def reason(self) -> str:
        text = self.values.text if self.values.look in (Look.SMALL, Look.LIKELY, Look.FRESH) else ""
        if not text:
            return AS_THE_BLOCK
        return text if text.startswith(BY_VALUES) else f"{BY_VALUES}, {text}"


@torch.no_grad()
def find_untrained(parts: Parts) -> Untrained:
    """The parameters that were never trained, in a module of which other parts were."""
    every = list(_parts(parts))
    is_pretrained = _is_pretrained(every)
    if is_pretrained:
        new = list(_new_parts(every))
    else:
        new = [part for part in every if part.values.text.startswith(BY_VALUES)]
    return Untrained({id(parameter): part.reason for part in new for parameter in part.parameters}, is_pretrained)


def _new_parts(every: list[_Part]) -> Iterator[_Part]:
    blank = {part.owner for part in every if part.values.look is Look.BLANK}
    trained = {part.owner for part in every if part.is_trained}
    inside = defaultdict[str, set[bool]](set)  # name of a module -> whether parts in it are new, of those that say it
    unsaid = []
    for part in every:
        is_new = _is_new(part, part.owner in blank, part.owner in trained)
        if is_new is None:
            unsaid.append(part)
            continue
        for outer in outer_names(part.owner):
            inside[outer].add(is_new)
        if is_new:
            yield part
    for part in unsaid:
        around = next((inside[outer] for outer in outer_names(part.owner) if inside[outer]), set())
        is_blank = part.values.look is Look.BLANK and True in around
        if around == {True} or is_blank:
            yield part


def _is_new(part: _Part, is_beside_blank: bool, is_beside_trained: bool) -> bool | None:
    """What the values of a part say; beside it: whether there are norms that were not trained, and parts that were."""
    if part.is_trained:
        return False
    if part.values.look is Look.FRESH or (part.values.look is Look.SMALL and not is_beside_trained):
        return True
    if part.values.look is Look.LIKELY:
        is_usual = is_beside_blank or part.bias is Look.SMALL or part.values.is_usual
        if part.bias is Look.BLANK or (is_usual and not is_beside_trained):
            return True
    return None


def _parts(parts: Parts) -> Iterator[_Part]:
    for name, owner in parts.named:
        known = {key: _remembered(text) for key, text in vars(owner).get(ORIGINS, {}).items()}
        parameters = {} if isinstance(owner, LoRALayer) else own_parameters(owner)
        if owner._modules:
            for key, parameter in parameters.items():
                yield _Part(name, [parameter], known.get(key) or values_of(parameter, owner), None)
        elif known:
            yield _Part(owner_name(name), list(parameters.values()), max(known.values()), None)
        elif parameters:
            yield _Part(owner_name(name), list(parameters.values()), *_asked(owner, parameters))


def _asked(owner: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[Values, Look | None]:
    """Of a module without parts: the values that say most, of its matrices if it has any, and what its bias says."""
    weight = parameters.get("weight")
    bias = parameters.get("bias")
    if weight is not None and weight.ndim < 2 and look_of_bias(bias, weight) is Look.UNKNOWN:
        return Values(), Look.UNKNOWN  # a norm that was trained
    matrices = [parameter for parameter in parameters.values() if parameter.ndim > 1]
    most = max(values_of(parameter, owner) for parameter in matrices or parameters.values())
    if weight is None or most.look >= Look.FRESH:
        return most, None
    return most, look_of_bias(bias, weight, owner)


def _remembered(text: str) -> Values:
    if text.startswith(BY_VALUES):
        return Values(Look.FRESH, 0, text)
    return Values({PRETRAINED: Look.TRAINED, INITIAL: Look.FRESH}.get(text, Look.UNKNOWN), size=FEW)


def _is_pretrained(every: list[_Part]) -> bool | None:
    sizes = defaultdict[Look, list[int]](list)
    for part in every:
        sizes[part.values.look].append(part.values.size)
    trained = sizes[Look.TRAINED]
    fresh = sizes[Look.FRESH] + sizes[Look.LIKELY]
    if not trained and not fresh:
        return None
    shares = len(trained) / len(trained + fresh), sum(trained) / max(sum(trained + fresh), 1)
    if max(shares) > FEW_PRETRAINED:
        return True
    unknown = sum(size >= FEW for size in sizes[Look.UNKNOWN])
    return False if unknown <= FEW_PRETRAINED * len(fresh) else None
