"""Which parts of a module were never trained, while others were: heads and decoders beside what is pretrained.

Each tensor says by its values what it is (`initial_values.py`). A part is a module without parts, or a parameter beside
the parts of its module. What can't say it, as a norm or a layer of few values, is what the block around it is.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import join, outer_names, owner_name
from lightning_qlora.survey.initial_values import FEW, Look, Values, look_of_bias, values_of
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.records import own_parameters

BY_VALUES = "new: its values are those of an initialization"  # beginning of a reason
AS_THE_BLOCK = f"{BY_VALUES}, as those of the block around it"
ORIGINS = "_qlora_origins"  # attribute of a module: key of a parameter -> its reason, or one of these; "": unknown
PRETRAINED = "pretrained"
INITIAL = "initial"  # in a module of which nothing looked pretrained
FEW_PRETRAINED = 0.1  # of the tensors, or of their values: up to here all is taken for new


class Untrained(NamedTuple):
    new: dict[int, str]  # id of a parameter -> which initialization it has
    is_pretrained: bool | None  # whether anything was trained; None: nothing is certain


class _Part(NamedTuple):
    name: str
    parameters: list[nn.Parameter]
    values: list[Values]
    bias: Look | None  # of its bias, or of the weight of a norm without one; None: there is none, or it is not asked

    @property
    def looks(self) -> set[Look]:
        return {each.look for each in self.values}

    @property
    def is_trained(self) -> bool:
        return Look.TRAINED in self.looks or self.bias is Look.UNKNOWN


class _Evidence:
    """What is known of the parts in each module: whether some were trained, and some not."""

    def __init__(self) -> None:
        self._of = defaultdict[str, set[bool]](set)

    def add(self, part: _Part, is_new: bool) -> None:
        for outer in outer_names(owner_name(part.name)):
            self._of[outer].add(is_new)

    def around(self, part: _Part) -> set[bool]:
        """That of the innermost module around a part of which something is known."""
        return next((self._of[outer] for outer in outer_names(owner_name(part.name)) if self._of[outer]), set())

    def beside(self, part: _Part) -> set[bool]:
        return self._of[owner_name(part.name)]


def find_untrained(parts: Parts) -> Untrained:
    """The parameters that were never trained, in a module of which other parts were."""
    every = list(_parts(parts))
    verdicts: dict[str, bool] = {}
    evidence = _Evidence()

    def decide(part: _Part, is_new: bool) -> None:
        verdicts[part.name] = is_new
        evidence.add(part, is_new)

    for part in every:
        if part.is_trained:
            decide(part, False)
        elif Look.FRESH in part.looks:
            decide(part, True)
    blank = {owner_name(part.name) for part in every if part.looks == {Look.BLANK}}
    trained = {owner_name(part.name) for part in every if verdicts.get(part.name) is False}
    likely = [part for part in every if part.name not in verdicts and Look.LIKELY in part.looks]
    certain = [part for part in likely if _is_certain(part, blank, trained, evidence.beside(part))]
    for part in certain:
        decide(part, True)
    is_pretrained = _is_pretrained(every)
    if not is_pretrained:
        recorded = [part for part in every if any(each.text.startswith(BY_VALUES) for each in part.values)]
        return Untrained({id(p): _reason(part) for part in recorded for p in part.parameters}, is_pretrained)
    for part in every:
        if part.name not in verdicts:
            verdicts[part.name] = _as_the_block(part, evidence.around(part), owner_name(part.name) in trained)
    return Untrained({id(p): _reason(part) for part in every if verdicts[part.name] for p in part.parameters}, True)


def _parts(parts: Parts) -> Iterator[_Part]:
    values: dict[int, Values] = {}
    for name, owner in parts.named:
        known = {key: _remembered(text) for key, text in vars(owner).get(ORIGINS, {}).items()}
        parameters = own_parameters(owner)
        if isinstance(owner, LoRALayer):
            yield _Part(name, [], list(known.values()), None)
            continue
        for key, parameter in parameters.items():
            if id(parameter) not in values:
                values[id(parameter)] = known[key] if key in known else values_of(parameter, owner)
        own = [values[id(parameter)] for parameter in parameters.values()]
        if owner._modules:
            for (key, parameter), each in zip(parameters.items(), own, strict=True):
                yield _Part(join(name, key), [parameter], [each], None)
        elif own:
            part = _Part(name, list(parameters.values()), own, None)
            if "weight" in parameters and not part.looks & {Look.TRAINED, Look.FRESH}:
                part = part._replace(bias=look_of_bias(parameters.get("bias"), parameters["weight"]))
            yield part


def _remembered(text: str) -> Values:
    """What an earlier conversion decided."""
    if text.startswith(BY_VALUES):
        return Values(Look.FRESH, text)
    return Values({PRETRAINED: Look.TRAINED, INITIAL: Look.FRESH}.get(text, Look.UNKNOWN), size=FEW)


def _is_certain(part: _Part, blank: set[str], trained: set[str], beside: set[bool]) -> bool:
    """Whether a part with normal values was not trained: its bias or a norm beside it was not, or it is large alone.

    `blank`, `trained`: modules that hold norms that were not trained, or parts that were.
    """
    owner = owner_name(part.name)
    if part.bias is Look.BLANK:
        return True
    if part.bias is Look.UNKNOWN or owner in trained:
        return False
    if part.bias is Look.SMALL or (owner in blank and False not in beside):
        return True
    return any(each.is_usual for each in part.values)


def _is_pretrained(every: list[_Part]) -> bool | None:
    looks = defaultdict[Look, list[int]](list)
    for part in every:
        for each in part.values:
            if each.look is not Look.UNKNOWN or each.size >= FEW:
                looks[each.look].append(each.size)
    trained = looks[Look.TRAINED]
    fresh = looks[Look.FRESH] + looks[Look.LIKELY]
    if not trained and not fresh:
        return None
    shares = len(trained) / len(trained + fresh), sum(trained) / max(sum(trained + fresh), 1)
    if max(shares) > FEW_PRETRAINED:
        return True
    return False if len(looks[Look.UNKNOWN]) <= FEW_PRETRAINED * len(fresh) else None


def _as_the_block(part: _Part, around: set[bool], has_trained_beside: bool) -> bool:
    """Whether a part that can't say it is new: as the block around it, if that was either trained or not."""
    if around == {True}:
        return True
    if around == {True, False} and part.looks == {Look.BLANK}:
        return True
    return Look.SMALL in part.looks and part.bias is not Look.UNKNOWN and not has_trained_beside


def _reason(part: _Part) -> str:
    named = [each for each in part.values if each.look in (Look.FRESH, Look.LIKELY, Look.SMALL) and each.text]
    if not named:
        return AS_THE_BLOCK
    text = max(named, key=lambda each: each.size).text
    return text if text.startswith(BY_VALUES) else f"{BY_VALUES}, {text}"
