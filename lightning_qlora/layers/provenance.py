"""Where the values of a module come from. New is what is outside of a loaded model, or was not in its files."""

import re
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from lightning_qlora.layers.names import Place, is_transformers_model, once, places_of

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


def transformers_models(places: Iterable[Place]) -> list[Place]:
    """The transformers models, each once."""
    return [place for place in once(places) if is_transformers_model(place.module)]


def loaded_models(places: Iterable[Place]) -> list[Place]:
    """The transformers models that were loaded from weights, without those inside another one."""
    models = transformers_models(places)
    inner = {id(part.module) for model in models for part in model.inside[1:]}
    outermost = [model for model in models if id(model.module) not in inner]
    # A copy of a loaded model has lost the marks of its tensors, but not its name.
    return [model for model in outermost if _is_marked(model) or getattr(model.module, "name_or_path", None)]


def new_parameters(places: Sequence[Place]) -> dict[int, str]:
    """Id -> reason, of each trainable parameter that has to train in full because its value is random.

    If a transformers model was loaded, that is everything outside of such models. In each model it is the head of a
    model for classification, and what `from_pretrained` of transformers 5 reported as newly initialized.
    """
    for place in places:
        _mark(place.module._parameters.get(key) for key in vars(place.module).get(MARKED, ()))
    new: dict[int, str] = {}
    every = list(places[0].parameters)
    loaded = loaded_models(places)
    if loaded:
        kinds = " and ".join(dict.fromkeys(type(model.module).__name__ for model in loaded))
        inside = {id(parameter) for model in loaded for parameter in model.parameters}
        new |= {id(p): f"{OUTSIDE} of the loaded {kinds}" for p in every if id(p) not in inside}
    for model in transformers_models(places):
        for parameter in _head(model.module):
            new.setdefault(id(parameter), f"new: classification head of the {type(model.module).__name__}")
        if _is_marked(model):
            for place in model.inside:
                for parameter in _without_mark(place.module):
                    new[id(parameter)] = "new: initialized when the model was loaded"
    return {key: new[key] for key in (id(p) for p in every if p.requires_grad) if key in new}


def mark_as_loaded(root: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Give parameters that replace others the mark of those, so that they are not taken for new ones."""
    models = filter(_is_marked, transformers_models(places_of(root)))
    ids = {id(parameter) for model in models for parameter in model.parameters}
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


def _has_mark(parameter: Tensor) -> bool:
    return bool(getattr(parameter, LOADED_TENSOR, False))


def _is_marked(model: Place) -> bool:
    return any(map(_has_mark, model.parameters))
