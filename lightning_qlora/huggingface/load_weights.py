"""Weights of a module that was sharded on the meta device: no rank ever holds the whole model.

    4-bit layer i       rank i % n reads it, quantizes it and initializes its adapter, as one device does, and sends the
                        bytes and the adapter; every rank keeps its part of them
    all else            every rank reads its part

So a rank has its part of the model and one layer in memory. Loading sends what one forward pass gathers.

transformers loads such a model before it is sharded, without values: tensors with the shapes in the files become those
of a dense copy of the model on the meta device. Its types, and its marks of what the files lack, are set on the model.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lightning_qlora.adapters.conversion import conversion_of
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.adapters.save_load import set_adapter_of_module
from lightning_qlora.huggingface.model_folder import ModelFolder
from lightning_qlora.layers.dtensor import is_sharded, local_part, of_all_ranks
from lightning_qlora.layers.lora_layer import ADAPTER
from lightning_qlora.layers.names import (
    is_transformers_model,
    join,
    named,
    named_tensors,
    owner_name,
    parameter_and_number,
)
from lightning_qlora.layers.packed_linear import BASE, PackedLayer
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.layers.reasons import LOADED_TENSOR
from lightning_qlora.layers.records import renew

NO_VALUES = (
    "The weights are read after configure_model has sharded the model, so nothing can be computed from them there, as "
    "resize_token_embeddings does. Save the changed model in a folder first, or load it in __init__."
)


def load_weights(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read the weights of a module on the meta device, after `fully_shard`; all ranks must call it.

    Args:
        module: A module with the parameter names of the folder. What is not on the meta device is not read.
        folder: A folder with model.safetensors, or with model.safetensors.index.json and the files that it lists.

    Raises:
        FileNotFoundError, ValueError: If the folder lacks a tensor, or has it in another shape or with NaN or Inf.
    """
    read_weights(module, ModelFolder.open(folder) if is_transformers_model(module) else ModelFolder(folder, None))
    conversion = conversion_of(module)
    if conversion is not None and (adapter := conversion.given[-1].adapter) is not None:
        set_adapter_of_module(module, read_adapter(adapter))


@torch.no_grad()
def read_weights(module: nn.Module, folder: ModelFolder) -> None:
    """`load_weights` from an opened folder. The adapters get their initial values."""
    device = _device_of(module)
    _read_layers(module, folder, device)
    for places in _tensors_on_meta(module):
        first, owner, own_key = places[0]
        name = next((name for name, _, _ in places if name in folder.entries), None)
        if name is None:
            raise ValueError(
                f"{first}: is on the meta device, so it has no data, and {folder.folder} has no tensor of this "
                "name. Load it, or build it outside of the meta device."
            )
        held = owner[own_key]
        value = _with_data(held, _read(folder, name, tuple(held.shape)), device)
        for _, tensors, key in places:
            tensors[key] = value
    renew(module)


def _read_layers(module: nn.Module, folder: ModelFolder, device: torch.device) -> None:
    """Read the 4-bit layers, each rank one at a time. If the model is not sharded, each rank reads all of them."""
    shared = dist.is_initialized() and any(map(is_sharded, module.parameters()))
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if shared else (1, 0)
    layers = [(name, layer) for name, layer in adapted_layers(module).items() if layer.packed.is_meta]
    groups = [layers[first : first + ranks] for first in range(0, len(layers), ranks)]
    silent = True if rank else None  # None: also where stderr is no terminal
    for group in tqdm(groups, "Quantizing", leave=False, delay=2, unit=f" x {ranks} layers", disable=silent):
        made, error = None, None
        try:
            if rank < len(group):
                name, layer = group[rank]
                made = _make(module, name, layer, folder, device)
        except (OSError, ValueError) as raised:
            error = str(raised)
        for raised_on in filter(None, of_all_ranks(error) if ranks > 1 else [error]):
            raise ValueError(raised_on)  # on all ranks: the others would wait for the layer of the one that failed
        for source, (_, layer) in enumerate(group):
            _share(layer, made if source == rank else None, source, device, ranks)


def _share(layer: QLoRALinear, made: QLoRALinear | None, source: int, device: torch.device, ranks: int) -> None:
    """Set the tensors of a layer to this rank's part of the tensors of rank `source`."""
    values = {}
    for key in (*BASE, *ADAPTER):
        tensors: dict[str, Any] = vars(layer) if key in vars(layer) else layer._parameters
        held = tensors[key]
        if held is None:
            continue
        if made is None:
            value = torch.empty(held.shape, dtype=held.dtype, device=device)
        else:
            value = getattr(made, key).data.contiguous()
        if ranks > 1:
            dist.broadcast(value, source)
        tensors[key] = _with_data(held, value, device)
        values[key] = value
    if layer.initial is not None:
        layer.set_initial(values["lora_A"], values["lora_B"])
    if made is not None and made.dense_weight is not None:
        layer.dense_weight = made.dense_weight  # the calibrated adapter is computed on this rank


def _make(module: nn.Module, name: str, layer: QLoRALinear, folder: ModelFolder, device: torch.device) -> QLoRALinear:
    """The layer that a single device makes from the float weight in the folder."""
    made: Any = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    expert = parameter_and_number(name)
    if expert is None:
        rows = layer._as_stored(_read(folder, join(name, "weight"), tuple(layer.weight.shape)))
    else:
        stack: Any = module.get_submodule(owner_name(name))
        own = f"{expert[0]}.{expert[1]}"
        if own in folder.entries:  # of a conversion by transformers
            weight = _read(folder, own, stack.expert_shape)
        else:
            weight = _read(folder, expert[0], stack.weight_shape).view(len(stack), *stack.expert_shape)[expert[1]]
        rows = weight.T if stack.transposed else weight
    made._parameters["weight"] = nn.Parameter(rows.to(layer.weight_dtype), requires_grad=False)
    with named(name):
        QLoRALinear.from_linear(made, layer.config, name, device, layer.seed_name)
    if made.dense_weight is not None:
        made.dense_weight = rows  # mapped from the file until it is used
    assert isinstance(made, QLoRALinear)
    return made


def _read(folder: ModelFolder, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the folder, mapped from its file."""
    if name not in folder.entries or folder.is_packed(name):
        what = "is in 4 bits already" if name in folder.entries else "is missing"
        raise ValueError(
            f"{folder.folder}: {name!r} {what}. Use a folder with all weights of the model in 16 or 32 bits."
        )
    value = folder.tensors([name])[name]
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{folder.where(name)} has shape {list(value.shape)}, and the module has {list(shape)} there. {NO_VALUES}"
        )
    return value


def _with_data(held: Tensor, value: Tensor, device: torch.device) -> Tensor:
    """The tensor with values that replaces a tensor on the meta device."""
    part = local_part(value, held, device)
    if not isinstance(held, nn.Parameter):
        return part
    made: Tensor = (nn.Parameter if is_sharded(held) else type(held))(part, requires_grad=held.requires_grad)
    if hasattr(held, LOADED_TENSOR):
        setattr(made, LOADED_TENSOR, True)
    return made


def _tensors_on_meta(module: nn.Module) -> list[list[tuple[str, dict[str, Any], str]]]:
    """Name, dict and key of every tensor on the meta device, tied ones together; without 4-bit weights and adapters."""
    found: dict[int, list[tuple[str, dict[str, Any], str]]] = {}
    for name, owner in module.named_modules(remove_duplicate=False):
        for tensors in (owner._parameters, owner._buffers):
            for key, tensor in tensors.items():
                of_layer = isinstance(owner, PackedLayer) and key in (*BASE, *ADAPTER)
                if tensor is not None and tensor.is_meta and not of_layer:
                    found.setdefault(id(tensor), []).append((join(name, key), tensors, key))
    return list(found.values())


def _device_of(module: nn.Module) -> torch.device:
    """The device of this rank in the mesh of the sharded parameters; the CPU without any."""
    kind = next((p.device_mesh.device_type for p in module.parameters() if isinstance(p, DTensor)), "cpu")
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())


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
