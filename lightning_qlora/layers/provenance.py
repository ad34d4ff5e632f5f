"""Where the values of a module come from. New is what is outside of a loaded model, or was not in its files."""

import re
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from lightning_qlora.layers.names import Place, is_transformers_model, places_of

LOADED = "_qlora_loaded"  # attribute of a model that was quantized while it loaded: whether its files were in 4 bits
OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output_projection")  # for models without get_output_embeddings
CLASSIFIERS = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)$")  # names of transformers' classes
HEADS = ("score", "classifier", "qa_outputs")  # names of the head where a model does not say which part is its base
OUTSIDE = "new: outside"  # beginning of a reason
LOADED_TENSOR = "_is_hf_initialized"  # transformers 5 sets it on each tensor that it found in the files
MARKED = "_qlora_marked"  # attribute of a module: keys of its parameters that had this mark (`keep_marks`)


def get_output_embeddings(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """What `get_output_embeddings` of each of these modules returns."""
    for model in modules:
        if callable(getattr(model, "get_output_embeddings", None)):
            try:
                embedding = model.get_output_embeddings()  # type: ignore[operator]
            except (NotImplementedError, AttributeError):  # transformers models without a head
                continue
            if embedding is not None:
                yield embedding


def models_of(places: Sequence[Place]) -> list[int]:
    """The numbers of the places of transformers models; each model once."""
    numbers: dict[int, int] = {}
    for number, place in enumerate(places):
        if is_transformers_model(place.module):
            numbers.setdefault(id(place.module), number)
    return list(numbers.values())


def loaded_models(places: Sequence[Place]) -> list[int]:
    """The same of the models that were loaded from weights, without those inside another one."""
    for place in places:
        _mark(place.module._parameters.get(key) for key in vars(place.module).get(MARKED, ()))
    models = models_of(places)
    inner = {id(place.module) for number in models for place in places[number + 1 : places[number].end]}
    outermost = [number for number in models if id(places[number].module) not in inner]
    # A copy of a loaded model has lost the marks of its tensors, but not its name.
    return [
        number
        for number in outermost
        if _is_marked(_parameters_of(places, number)) or getattr(places[number].module, "name_or_path", None)
    ]


def new_parameters(places: Sequence[Place]) -> dict[int, str]:
    """Id -> reason, of each trainable parameter that has to train in full because its value is random.

    If a transformers model was loaded, that is everything outside of such models. In each model it is the head of a
    model for classification, and what `from_pretrained` of transformers 5 reported as newly initialized.
    """
    new: dict[int, str] = {}
    loaded = loaded_models(places)
    if loaded:
        kinds = " and ".join(dict.fromkeys(type(places[number].module).__name__ for number in loaded))
        inside = {id(parameter) for number in loaded for parameter in _parameters_of(places, number)}
        outside = (parameter for parameter in _parameters_of(places, 0) if id(parameter) not in inside)
        new |= {id(parameter): f"{OUTSIDE} of the loaded {kinds}" for parameter in outside}
    for number in models_of(places):
        model = places[number].module
        for parameter in _head(model):
            new.setdefault(id(parameter), f"new: classification head of the {type(model).__name__}")
        if _is_marked(_parameters_of(places, number)):
            for place in places[number : places[number].end]:
                new |= dict.fromkeys(map(id, _without_mark(place.module)), "new: initialized when the model was loaded")
    frozen = {id(parameter) for parameter in _parameters_of(places, 0) if not parameter.requires_grad}
    return {key: reason for key, reason in new.items() if key not in frozen}


def mark_as_loaded(root: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Give parameters that replace others the mark of those, so that they are not taken for new ones."""
    places = places_of(root)
    models = [[*_parameters_of(places, number)] for number in models_of(places)]
    ids = {id(parameter) for model in models if _is_marked(model) for parameter in model}
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
    parameters = [parameter for parameter in part._parameters.values() if parameter is not None]
    if not part._modules and any(map(_has_mark, parameters)):
        return []
    return [parameter for parameter in parameters if not _has_mark(parameter)]


def _parameters_of(places: Sequence[Place], number: int) -> Iterator[nn.Parameter]:
    """The parameters of the module in a place, those of its parts included."""
    for place in places[number : places[number].end]:
        yield from (parameter for parameter in place.module._parameters.values() if parameter is not None)


def _has_mark(parameter: Tensor) -> bool:
    return bool(getattr(parameter, LOADED_TENSOR, False))


def _is_marked(parameters: Iterable[Tensor]) -> bool:
    return any(map(_has_mark, parameters))
