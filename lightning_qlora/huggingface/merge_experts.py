"""Where a model's folder has the experts of an adapter: in one tensor for all, or in a tensor for each expert.

model.layers.0.mlp.experts.gate_up_proj       [experts, out, in], [experts, in, out] or [experts * out, in]
model.layers.0.mlp.experts.gate_up_proj.3     expert 3, [out, in] or [in, out] (`model_folder.Conversion`)
"""

from typing import NamedTuple

from lightning_qlora.adapters.adapter import PREFIX, Adapter
from lightning_qlora.adapters.model_folder import ModelFolder, empty_model
from lightning_qlora.adapters.peft_experts import assign_parameters, unpack_known
from lightning_qlora.layers.state_dict import CheckpointMismatchError


class ExpertTensor(NamedTuple):
    """What a tensor of a folder holds: all experts of a parameter (number is None), or one."""

    parameter: str
    number: int | None


def assign_to_folder(adapter: Adapter, folder: ModelFolder) -> Adapter:
    """An adapter with the model's names for its experts.

    Args:
        adapter: The adapter.
        folder: The model's folder.

    Raises:
        ValueError: If only transformers could tell these names, and it can't.
        CheckpointMismatchError: If the adapter does not fit the model.
    """
    if not adapter.packed or adapter.experts:
        return unpack_known(adapter)
    what_for = "which parameters an adapter of experts belongs to"
    return assign_parameters(adapter, folder.model or empty_model(folder.folder, what_for))


def find_experts(adapter: Adapter, folder: ModelFolder, floats: tuple[str, ...]) -> dict[str, ExpertTensor]:
    """Key of every tensor that holds adapted experts -> what it holds.

    Raises:
        ValueError: If such a tensor is not of one of the types `floats`; names file and key.
        CheckpointMismatchError: If there is no such tensor, or it is of another number of experts.
    """
    found = {}
    for parameter, stack in adapter.experts.items():
        name = folder.find(parameter)
        if name is not None:
            found[name] = ExpertTensor(parameter, None)
            sizes = folder.entries[name].shape
            if sizes[0] % stack.number if stack.flat else (len(sizes) != 3 or sizes[0] != stack.number):
                raise CheckpointMismatchError(
                    f"{folder.where(name)} has shape {list(sizes)}, the adapter {adapter.source} is for "
                    f"{stack.number} experts."
                )
            continue
        for number in range(stack.number):
            name = folder.find(f"{parameter}.{number}")
            if name is None:
                raise CheckpointMismatchError(
                    f"{adapter.source}: key '{PREFIX}{parameter}' (expert {number}) does not fit: {folder.folder} has "
                    f"neither a tensor {parameter!r} nor one of that expert. Load the model with lightning_qlora and "
                    "the adapter, merge() it, and save it."
                )
            found[name] = ExpertTensor(parameter, number)
    for name in found:
        if folder.entries[name].dtype not in floats:
            raise ValueError(
                f"{folder.where(name)} is {folder.entries[name].dtype}: an adapter of experts can be merged into "
                f"{', '.join(floats)}."
            )
    return found
