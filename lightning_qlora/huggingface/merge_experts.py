"""Where a model's folder has the experts of an adapter: in one tensor for all, or in tensors for each expert.

    model.layers.0.mlp.experts.gate_up_proj           [experts, out, in], [experts, in, out] or [experts * out, in]
    model.layers.0.mlp.experts.3.gate_proj.weight     the first half of expert 3's [out, in]
    model.layers.0.mlp.experts.3.up_proj.weight       the second half

transformers 5 joins the second kind while it loads (conversion_mapping.py: MergeModulelist, then Concatenate).
"""

from typing import NamedTuple

from lightning_qlora.adapters.adapter import PREFIX, Adapter
from lightning_qlora.adapters.peft_experts import assign_parameters, unpack_known
from lightning_qlora.files.safetensors_folder import WeightFolder
from lightning_qlora.huggingface.bnb_checkpoint import empty_model
from lightning_qlora.layers.state_dict import CheckpointMismatchError

# Name of a parameter -> names of the layers of one expert whose weights, in this order, are its rows.
PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",), ("w1",)),
    "down_proj": (("down_proj",), ("w2",)),
}
BLOCKS = (("", ""), (".mlp.", ".block_sparse_moe."))  # part of a name in transformers 5 -> in files of before


class ExpertTensor(NamedTuple):
    """What a tensor of a folder holds: all experts of a parameter (number is None), or one of the parts of one."""

    parameter: str
    number: int | None
    parts: list[str]


def assign_to_folder(adapter: Adapter, folder: WeightFolder) -> Adapter:
    """An adapter with the model's names for its experts.

    Raises:
        ValueError: If only transformers could tell these names, and it can't.
        CheckpointMismatchError: If the adapter does not fit the model.
    """
    if not adapter.packed or adapter.experts:
        return unpack_known(adapter)
    return assign_parameters(adapter, empty_model(folder.folder, "which parameters an adapter of experts belongs to"))


def find_experts(adapter: Adapter, folder: WeightFolder, floats: tuple[str, ...]) -> dict[str, ExpertTensor]:
    """Key of every tensor that holds adapted experts -> what it holds.

    Raises:
        ValueError: If such a tensor is not of one of the types `floats`; names file and key.
        CheckpointMismatchError: If there is no such tensor, or it is of another number of experts.
    """
    found = {}
    for parameter, stack in adapter.experts.items():
        key = folder.find(parameter)
        if key is not None:
            found[key] = ExpertTensor(parameter, None, [key])
            sizes = folder.entries[key].shape
            if sizes[0] % stack.number if stack.flat else (len(sizes) != 3 or sizes[0] != stack.number):
                raise CheckpointMismatchError(
                    f"{folder.file_of[key]}: {key!r} has shape {list(sizes)}, the adapter {adapter.source} is for "
                    f"{stack.number} experts."
                )
            continue
        for number in range(stack.number):
            keys = _keys_of_one(parameter, number, folder)
            if keys is None:
                raise CheckpointMismatchError(
                    f"{adapter.source}: key '{PREFIX}{parameter}' (expert {number}) does not fit: {folder.folder} has "
                    f"neither a tensor {parameter!r} nor one of that expert. Load the model with lightning_qlora and "
                    "the adapter, merge() it, and save it."
                )
            found |= dict.fromkeys(keys, ExpertTensor(parameter, number, keys))
    for key in found:
        if folder.entries[key].dtype not in floats:
            raise ValueError(
                f"{folder.file_of[key]}: {key!r} is {folder.entries[key].dtype}: an adapter of experts can be merged "
                f"into {', '.join(floats)}."
            )
    return found


def _keys_of_one(parameter: str, number: int, folder: WeightFolder) -> list[str] | None:
    owner, _, last = parameter.rpartition(".")
    for names in PARTS.get(last, ()):
        for new, old in BLOCKS:
            experts = owner.replace(new, old) if new else owner
            keys = [folder.find(f"{experts}.{number}.{name}.weight") for name in names]
            if None not in keys:
                return [key for key in keys if key is not None]
    return None
