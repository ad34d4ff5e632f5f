"""Which tensors of a model's folder hold the layers of an adapter: each one layer, or all experts of a parameter.

model.layers.0.mlp.up_proj.weight             [out, in], of transformers' Conv1D [in, out]
model.layers.0.mlp.experts.gate_up_proj       [experts, out, in], [experts, in, out] or [experts * out, in]
model.layers.0.mlp.experts.gate_up_proj.3     expert 3, [out, in] or [in, out] (`model_folder.Conversion`)
"""

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import PREFIX, Adapter
from lightning_qlora.adapters.model_folder import ModelFolder, empty_model
from lightning_qlora.adapters.peft_experts import assign_parameters, unstack_known
from lightning_qlora.layers.dotted_names import expert_name
from lightning_qlora.layers.layer_state import CheckpointMismatchError


class AdaptedTensor(NamedTuple):
    """What a tensor of a folder holds.

    Attributes:
        layers: Names of the layers.
        transposed: The tensor has their weights as [in, out].
        stacked: The tensor has a dimension of experts.
    """

    layers: list[str]
    transposed: bool
    stacked: bool = False

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Name of each layer -> its weight, a view of shape [out, in]."""
        parts = tensor.view(len(self.layers), -1, tensor.shape[-1])
        return dict(zip(self.layers, parts.mT if self.transposed else parts, strict=True))

    def join(self, weights: list[Tensor]) -> Tensor:
        """The reverse of `split`, from the weights in the order of `layers`."""
        parts = [weight.T if self.transposed else weight for weight in weights]
        return torch.stack(parts) if self.stacked else torch.cat(parts)


def assign_to_folder(adapter: Adapter, folder: ModelFolder) -> Adapter:
    """An adapter with the model's names for its experts; raises as `empty_model` and `assign_parameters`."""
    if not adapter.expert_adapters or adapter.experts:
        return unstack_known(adapter)
    what_for = "which parameters an adapter of experts belongs to"
    return assign_parameters(adapter, folder.model or empty_model(folder.folder, what_for))


def find_layers(adapter: Adapter, folder: ModelFolder) -> dict[str, AdaptedTensor]:
    """Key of every tensor that holds adapted layers -> what it holds.

    CheckpointMismatchError if there is no such tensor, or it is of another number of experts.
    """

    def refuse(key: str, what: str) -> NoReturn:
        raise CheckpointMismatchError(
            f"{adapter.source}: key '{PREFIX}{key}' does not fit {folder.folder}: {what}. An adapter fits the model it "
            "was trained on. If this is that model, load it with lightning_qlora and the adapter, merge() it, and save "
            "it."
        )

    found = {}
    for name in adapter.layers:
        if adapter.expert_parameter(name) is None:
            key = folder.find(f"{name}.weight")
            if key is None:
                refuse(f"{name}.lora_A.weight", f"it has no tensor '{name}.weight'")
            found[key] = AdaptedTensor([name], folder.is_transposed(key, adapter, name))
    for parameter, stack in adapter.experts.items():
        layers = [expert_name(parameter, i) for i in range(stack.number)]
        if (key := folder.find(parameter)) is not None:
            found[key] = AdaptedTensor(layers, stack.transposed, not stack.flat)
            sizes = folder.entries[key].shape
            if sizes[0] % stack.number if stack.flat else (len(sizes) != 3 or sizes[0] != stack.number):
                refuse(parameter, f"{folder.where(key)} has shape {list(sizes)}, not {stack.number} experts")
            continue
        keys = [folder.find(f"{parameter}.{number}") for number in range(stack.number + 1)]
        for key, layer in zip(keys, layers, strict=False):
            if key is None:
                refuse(parameter, f"it has no tensor of {layer!r}")
            found[key] = AdaptedTensor([layer], stack.transposed)
        if (more := keys[-1]) is not None:
            refuse(parameter, f"{folder.where(more)} is of a further expert, not one of {stack.number}")
    return found
