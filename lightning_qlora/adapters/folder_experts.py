"""Where a model's folder has the experts of an adapter: in one tensor for all, or in a tensor for each expert.

model.layers.0.mlp.experts.gate_up_proj       [experts, out, in], [experts, in, out] or [experts * out, in]
model.layers.0.mlp.experts.gate_up_proj.3     expert 3, [out, in] or [in, out] (`model_folder.Conversion`)
"""

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import PREFIX, Adapter, ExpertStack
from lightning_qlora.adapters.model_folder import ModelFolder, empty_model
from lightning_qlora.adapters.peft_experts import assign_parameters, unstack_known
from lightning_qlora.layers.dotted_names import expert_name
from lightning_qlora.layers.layer_state import CheckpointMismatchError

FLOAT_NAMES = ("F32", "BF16", "F16")  # names of types in a safetensors header


class ExpertTensor(NamedTuple):
    """What a tensor of a folder holds: these layers, which are all experts of a parameter, or one."""

    layers: list[str]
    stack: ExpertStack

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Name of each layer -> its weight, a view of shape [out, in]."""
        parts = tensor.view(len(self.layers), -1, tensor.shape[-1])
        return dict(zip(self.layers, parts.mT if self.stack.transposed else parts, strict=True))

    def join(self, weights: list[Tensor], shape: torch.Size) -> Tensor:
        """The tensor of this shape that holds these weights, [out, in] each, in the order of `layers`."""
        return torch.stack([weight.T if self.stack.transposed else weight for weight in weights]).view(shape)


def assign_to_folder(adapter: Adapter, folder: ModelFolder) -> Adapter:
    """An adapter with the model's names for its experts; raises as `empty_model` and `assign_parameters`."""
    if not adapter.expert_adapters or adapter.experts:
        return unstack_known(adapter)
    what_for = "which parameters an adapter of experts belongs to"
    return assign_parameters(adapter, folder.model or empty_model(folder.folder, what_for))


def find_experts(adapter: Adapter, folder: ModelFolder) -> dict[str, ExpertTensor]:
    """Key of every tensor that holds adapted experts -> what it holds.

    Raises:
        ValueError: If such a tensor is not of one of the types `FLOAT_NAMES`; names file and key.
        CheckpointMismatchError: If there is no such tensor, or it is of another number of experts.
    """
    found = {}
    for parameter, stack in adapter.experts.items():
        layers = [expert_name(parameter, i) for i in range(stack.number)]
        name = folder.find(parameter)
        if name is not None:
            found[name] = ExpertTensor(layers, stack)
            sizes = folder.entries[name].shape
            if sizes[0] % stack.number if stack.flat else (len(sizes) != 3 or sizes[0] != stack.number):
                _refuse_number(adapter, stack, f"{folder.where(name)} has shape {list(sizes)}")
            continue
        for number, layer in enumerate(layers):
            name = folder.find(f"{parameter}.{number}")
            if name is None:
                raise CheckpointMismatchError(
                    f"{adapter.source}: key '{PREFIX}{parameter}' (expert {number}) does not fit: {folder.folder} has "
                    f"neither a tensor {parameter!r} nor one of that expert. Load the model with lightning_qlora and "
                    "the adapter, merge() it, and save it."
                )
            found[name] = ExpertTensor([layer], stack)
        if (name := folder.find(f"{parameter}.{stack.number}")) is not None:
            _refuse_number(adapter, stack, f"{folder.where(name)} holds expert {stack.number} of {parameter!r}")
    for name in found:
        if folder.entries[name].dtype not in FLOAT_NAMES:
            raise ValueError(
                f"{folder.where(name)} is {folder.entries[name].dtype}: an adapter of experts fits tensors of type "
                f"{', '.join(FLOAT_NAMES)}."
            )
    return found


def _refuse_number(adapter: Adapter, stack: ExpertStack, what: str) -> NoReturn:
    raise CheckpointMismatchError(
        f"{what}, the adapter {adapter.source} is for {stack.number} experts. An adapter fits the model it was "
        "trained on."
    )
