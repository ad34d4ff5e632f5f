"""Models that transformers loads without values, before they are sharded; `load_weights.py` reads these after that.

The chosen layers are converted on the meta device. For all else tensors with the shapes in the files become those of a
dense copy of the model on the meta device; its types, and its marks of what the files lack, are set on the model.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.experts.experts import QLoRAExperts
from lightning_qlora.huggingface.model_folder import ModelFolder
from lightning_qlora.layers.names import join, named_tensors
from lightning_qlora.layers.packed_layer import PackedLayer, to_parameters
from lightning_qlora.selection.apply import convert_layer
from lightning_qlora.selection.selection import Row
from lightning_qlora.survey.provenance import LOADED_TENSOR

NO_VALUES = (
    "The weights are read after configure_model has sharded the model, so nothing can be computed from them there, as "
    "resize_token_embeddings does. Save the changed model in a folder first, or load it in __init__."
)


def convert_without_data(
    model: nn.Module, folder: ModelFolder, chosen: dict[str, Row], shapes: dict[str, torch.Size]
) -> None:
    for key, each in chosen.items():
        entry = folder.entries.get(key)
        if f"{key}.0" in folder.entries or (entry is not None and entry.shape == shapes[key]):
            convert_layer(each).loaded = True
    to_parameters(model)


def mark_as_found(model: nn.Module, folder: ModelFolder) -> None:
    """Set the types and marks of the dense copy, `folder.model`, on the tensors of a model on the meta device."""
    dense: Any = folder.model
    sources = dict(named_tensors(dense))
    for name, part in model.named_modules():
        if isinstance(part, PackedLayer):
            weight = join(name, "weight")
            if isinstance(part, QLoRAExperts):
                weight = part.reported_name(name)
            part.dtype_before = dense.get_parameter(weight).dtype
            part.weight_dtype = part.dtype_before
            part._is_hf_initialized = part._parameters.get("bias") is None  # type: ignore[assignment]
        for key, parameter in part._parameters.items():
            same = sources.get(join(name, key))
            if parameter is not None and same is not None and parameter.dtype is not same.dtype:
                cast = torch.empty_like(parameter, dtype=same.dtype)
                part._parameters[key] = nn.Parameter(cast, requires_grad=parameter.requires_grad)
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            same = sources.get(join(name, key))  # None: of a 4-bit layer
            if tensor is not None and (same is None or hasattr(same, LOADED_TENSOR)):
                setattr(tensor, LOADED_TENSOR, True)


Version = tuple[str, Tensor, int]  # name of a tensor on the meta device, and its version when its model was loaded


def versions(model: nn.Module) -> list[Version]:
    return [(name, tensor, tensor._version) for name, tensor in named_tensors(model) if tensor.is_meta]


def check_unwritten(versions: Iterable[Version]) -> None:
    """ValueError, with the name, for a tensor on the meta device to which code wrote values: they would be lost."""
    for name, tensor, number in versions:
        if tensor._version != number:
            raise ValueError(f"{name}: configure_model wrote values to it, which would be lost. {NO_VALUES}")
