"""What transformers finds when it loads a model whose values are read later: names, data types, and what files lack.

transformers loads tensors without values, with the shapes in the files, into a dense copy of the model on the meta
device. The types and marks of the copy are then set on the model itself, whose layers are in 4 bits and may be sharded.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qlora.huggingface.model_folder import ModelFolder
from lightning_qlora.layers.names import join, named_tensors, parameter_and_number
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.layers.reasons import LOADED_TENSOR

NO_VALUES = (
    "The weights are read after configure_model has sharded the model, so nothing can be computed from them there, as "
    "resize_token_embeddings does. Save the changed model in a folder first, or load it in __init__."
)


def find_without_data(folder: ModelFolder, load: Callable[..., Any], load_config: Any) -> Any:
    """Load the model of a folder, on the meta device; `load` is `PreTrainedModel._load_pretrained_model`."""
    empty = {key: torch.empty(entry.shape, device="meta") for key, entry in folder.stored.entries.items()}
    return load(folder.model, empty, None, replace(load_config, device_map={"": "meta"}, hf_quantizer=None))


def mark_as_found(model: nn.Module, folder: ModelFolder) -> None:
    """Set the types and marks of the dense copy, `folder.model`, on the tensors of a model on the meta device."""
    dense: Any = folder.model
    found = dict(named_tensors(dense))
    for name, part in model.named_modules():
        if isinstance(part, PackedLayer):
            expert = parameter_and_number(name)
            part.weight_dtype = dense.get_parameter(join(name, "weight") if expert is None else expert[0]).dtype
            part._is_hf_initialized = part._parameters.get("bias") is None  # type: ignore[assignment]
        for key, held in part._parameters.items():
            known = found.get(join(name, key))
            if held is not None and known is not None and held.dtype is not known.dtype:
                cast = torch.empty_like(held, dtype=known.dtype)
                part._parameters[key] = nn.Parameter(cast, requires_grad=held.requires_grad)
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            known = found.get(join(name, key))  # None: of a 4-bit layer
            if tensor is not None and (known is None or hasattr(known, LOADED_TENSOR)):
                setattr(tensor, LOADED_TENSOR, True)


class Version(NamedTuple):
    """A tensor on the meta device, whose values are read later, when its model was loaded."""

    name: str
    tensor: Tensor
    number: int


def versions(model: nn.Module) -> list[Version]:
    """The tensors of a model that are on the meta device."""
    return [Version(name, tensor, tensor._version) for name, tensor in named_tensors(model) if tensor.is_meta]


def check_unwritten(versions: Iterable[Version]) -> None:
    """ValueError, with the name, for a tensor on the meta device to which code wrote values: they would be lost."""
    for name, tensor, number in versions:
        if tensor._version != number:
            raise ValueError(f"{name}: configure_model wrote values to it, which would be lost. {NO_VALUES}")
