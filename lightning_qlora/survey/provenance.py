"""Where the values of a module come from: pretrained, or new, which trains in full.

If transformers loaded a model, new is what is outside of it, or was not in its files. Else the values tell
(`untrained.py`).
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.untrained import find_untrained

LOADED = "_qlora_loaded"  # attribute of a model that was quantized while it loaded: whether its files were in 4 bits
CLASSIFIERS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")  # names of transformers' classes
HEADS = ("score", "classifier", "qa_outputs")  # names of the head where a model does not say which part is its base
OUTSIDE = "new: outside"  # beginning of a reason
LOADED_TENSOR = "_is_hf_initialized"  # transformers 5 sets it on each tensor that it found in the files
MARKED = "_qlora_marked"  # attribute of a module: keys of its parameters that had this mark (`keep_marks`)


class Origins(NamedTuple):
    """Where the values of a module come from; plain values, so that a rank can send them."""

    new: dict[str, str]  # a name of each trainable parameter that has to train in full because its value is random
    is_pretrained: bool | None  # None: nothing tells
    is_loaded: bool  # whether transformers loaded a model in it


NOTHING_KNOWN = Origins({}, None, False)


def origins_of(parts: Parts) -> Origins:
    is_loaded = False
    new: dict[int, str] = {}
    if parts.models:
        is_loaded = bool(loaded_models(parts))
        new = _new_by_loading(parts)
    is_pretrained: bool | None = True
    if not is_loaded:
        untrained = find_untrained(parts)
        new = untrained.new | new
        is_pretrained = untrained.is_pretrained
    names: dict[str, str] = {}
    for name, _, _, parameter in parts.parameters:
        reason = new.pop(id(parameter), None)
        if reason is not None and parameter.requires_grad:
            names[name] = reason
    return Origins(names, is_pretrained, is_loaded)


def loaded_models(parts: Parts) -> list[list[nn.Module]]:
    """The modules of each transformers model that was loaded from weights, without those inside another one."""
    inner = {id(module) for modules in parts.models.values() for module in modules[1:]}
    outermost = [modules for modules in parts.models.values() if id(modules[0]) not in inner]
    # A copy of a loaded model has lost the marks of its tensors, but not its name.
    return [modules for modules in outermost if _is_marked(modules) or getattr(modules[0], "name_or_path", None)]


def _new_by_loading(parts: Parts) -> dict[int, str]:
    """Id -> reason, of each parameter that is new because of what transformers loaded.

    If a transformers model was loaded, that is everything outside of such models. In each model it is the head of a
    model for classification, and what `from_pretrained` of transformers 5 reported as newly initialized.
    """
    for module in parts.modules:
        _mark(module._parameters.get(key) for key in vars(module).get(MARKED, ()))
    new: dict[int, str] = {}
    loaded = loaded_models(parts)
    if loaded:
        kinds = " and ".join(dict.fromkeys(type(modules[0]).__name__ for modules in loaded))
        inside = {id(parameter) for modules in loaded for parameter in parameters_of(modules)}
        every = map(id, parameters_of(parts.modules))
        new |= {number: f"{OUTSIDE} of the loaded {kinds}" for number in every if number not in inside}
    for modules in parts.models.values():
        for parameter in _head(modules[0]):
            new.setdefault(id(parameter), f"new: classification head of the {type(modules[0]).__name__}")
        if _is_marked(modules):
            for module in modules:
                for parameter in _without_mark(module):
                    new[id(parameter)] = "new: initialized when the model was loaded"
    return new


def parameters_of(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    for module in modules:
        yield from (parameter for parameter in module._parameters.values() if parameter is not None)


def mark_as_loaded(root: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Give parameters that replace others the mark of those, so that they are not taken for new ones."""
    models = filter(_is_marked, Parts.of(root).models.values())
    ids = {id(parameter) for modules in models for parameter in parameters_of(modules)}
    _mark(parameter for parameter in parameters if id(parameter) in ids)


def keep_marks(model: nn.Module) -> None:
    """Let a loaded model keep the marks of its parameters while a strategy replaces them by sharded ones."""
    for part in model.modules():
        vars(part)[MARKED] = [key for key, p in part._parameters.items() if p is not None and _has_mark(p)]


def _mark(parameters: Iterable[Tensor | None]) -> None:
    for parameter in parameters:
        if parameter is not None:
            setattr(parameter, LOADED_TENSOR, True)


def _head(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a classification model outside of its base model."""
    if CLASSIFIERS.search(type(model).__name__):
        base = getattr(model, str(model.base_model_prefix), None)
        for name, child in model.named_children():
            is_head = name in HEADS
            if isinstance(base, nn.Module):
                is_head = child is not base
            if is_head:
                yield from child.parameters()


def _without_mark(part: nn.Module) -> list[nn.Parameter]:
    """The parameters that were in no file; a layer that the files have in part, such as all but its bias, has none."""
    parameters = list(parameters_of([part]))
    if not part._modules and any(map(_has_mark, parameters)):
        return []
    return [parameter for parameter in parameters if not _has_mark(parameter)]


def _has_mark(parameter: Tensor) -> bool:
    return bool(getattr(parameter, LOADED_TENSOR, False))


def _is_marked(modules: Iterable[nn.Module]) -> bool:
    return any(map(_has_mark, parameters_of(modules)))
