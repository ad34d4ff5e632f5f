"""Weights of a module that was sharded on the meta device: no rank ever holds the whole model.

    4-bit layer i       rank i % n reads it, quantizes it and initializes its adapter, as one device does, and sends the
                        bytes and the adapter; every rank keeps its part of them
    all else            every rank reads its part

So a rank has its part of the model and one layer in memory. Loading sends what one forward pass gathers.

A model of transformers is loaded before it is sharded, without values (`without_data.py`).
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lightning_qlora.adapters.load import load_adapter_once
from lightning_qlora.huggingface.model_folder import ModelFolder
from lightning_qlora.layers.lora_layer import ADAPTER, LoRALayer
from lightning_qlora.layers.names import is_transformers_model, join, named
from lightning_qlora.layers.packed_layer import BASE, PackedLayer
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.records import conversion_of, renew
from lightning_qlora.tensors.dtensor import is_sharded, local_part, of_all_ranks
from lightning_qlora.tensors.held_types import types_before

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

    Example:
        ```python
        import torch
        from lightning_qlora import convert, load_weights, to_parameters
        from safetensors.torch import save_model
        from torch import distributed, nn
        from torch.distributed.fsdp import fully_shard

        save_model(nn.Sequential(nn.Linear(64, 64)), "model.safetensors")
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(64, 64))
        convert(model, r=4)
        to_parameters(model)
        fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
        load_weights(model, ".")
        distributed.destroy_process_group()
        ```
    """
    if is_transformers_model(module):
        read_weights(module, ModelFolder.open(folder))
    else:
        read_weights(module, ModelFolder(folder, None))
    conversion = conversion_of(module)
    if conversion is not None and conversion.given[-1].adapter is not None:
        load_adapter_once(Parts.of(module), conversion.given[-1].adapter)


@torch.no_grad()
def read_weights(module: nn.Module, folder: ModelFolder) -> None:
    """`load_weights` from an opened folder. The adapters get their initial values."""
    device = _device_of(module)
    _read_layers(module, folder, device)
    for places in _tensors_on_meta(module):
        first, owner, tensors, key = places[0]
        name = next((name for name, *_ in places if name in folder.entries), None)
        if name is None:
            raise ValueError(
                f"{first}: is on the meta device, so it has no data, and {folder.folder} has no tensor of this "
                "name. Load it, or build it outside of the meta device."
            )
        empty = tensors[key]
        value = _read(folder, name, tuple(empty.shape))
        value = value.to(types_before(owner).get(key, value.dtype))  # rounded as where it is not held in fp32
        value = _with_data(empty, value, device)
        for _, _, tensors, key in places:
            tensors[key] = value
    renew(module)


def _read_layers(module: nn.Module, folder: ModelFolder, device: torch.device) -> None:
    """Read the 4-bit layers, each rank one at a time. If the model is not sharded, each rank reads all of them."""
    ranks = 1
    rank = 0
    if dist.is_initialized() and any(map(is_sharded, module.parameters())):
        ranks = dist.get_world_size()
        rank = dist.get_rank()
    layers = [(name, layer) for name, layer in adapted_layers(module).items() if layer.packed.is_meta]
    groups = [layers[first : first + ranks] for first in range(0, len(layers), ranks)]
    silent = rank > 0 or None  # None: also where stderr is no terminal
    for group in tqdm(groups, "Quantizing", leave=False, delay=2, unit=f" x {ranks} layers", disable=silent):
        whole = None  # the layer that this rank reads
        error = None
        try:
            if rank < len(group):
                name, layer = group[rank]
                whole = _read_layer(name, layer, folder, device)
        except (OSError, ValueError) as raised:
            error = str(raised)
        errors = [error]
        if ranks > 1:
            errors = of_all_ranks(error)
        for message in filter(None, errors):
            raise ValueError(message)  # on all ranks: the others would wait for the layer of the one that failed
        for source, (_, layer) in enumerate(group):
            _share(layer, whole if source == rank else None, source, device, ranks)


def _share(layer: LoRALayer, whole: LoRALayer | None, source: int, device: torch.device, ranks: int) -> None:
    """Set the tensors of a layer to this rank's part of those of `whole`, which rank `source` has."""
    values = {}
    for key in (*BASE, *ADAPTER):
        tensors: dict[str, Any] = layer._parameters
        if key in vars(layer):
            tensors = vars(layer)
        empty = tensors[key]
        if empty is None:
            continue
        if whole is None:
            value = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        else:
            value = getattr(whole, key).data.contiguous()
        if ranks > 1:
            dist.broadcast(value, source)
        tensors[key] = _with_data(empty, value, device)
        values[key] = value
    if layer.initial is not None:
        layer.set_initial((values["lora_A"], values["lora_B"]))
    if whole is not None and whole.input_observer is not None and layer.input_observer is not None:
        # The calibrated adapter is computed on this rank.
        layer.input_observer.dense_weight = whole.input_observer.dense_weight


def _read_layer(name: str, layer: LoRALayer, folder: ModelFolder, device: torch.device) -> LoRALayer:
    new = layer.without_weight()
    new.set_arguments(layer.config, name, layer.seed_name)
    weights: Any = (weight.to(layer.dtype_before) for weight in _read_matrices(name, layer, folder))
    with named(name):
        new.initialize(weights, device)
    return new


def _read_matrices(name: str, layer: LoRALayer, folder: ModelFolder) -> Iterator[Tensor]:
    key = layer.weight_name(name)
    if f"{key}.0" in folder.entries:  # of a conversion by transformers
        for number in range(layer.matrix_count):
            yield _read(folder, f"{key}.{number}", layer.matrix_shape)
    else:
        yield from layer.split_matrices(_read(folder, key, layer.weight_shape))


def _read(folder: ModelFolder, name: str, shape: tuple[int, ...]) -> Tensor:
    if name not in folder.entries or folder.is_packed(name):
        problem = "is in 4 bits already" if name in folder.entries else "is missing"
        raise ValueError(
            f"{folder.folder}: {name!r} {problem}. Use a folder with all weights of the model in 16 or 32 bits."
        )
    value = folder.tensors([name])[name]
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{folder.where(name)} has shape {list(value.shape)}, and the module has {list(shape)} there. {NO_VALUES}"
        )
    return value


def _with_data(empty: Tensor, value: Tensor, device: torch.device) -> Tensor:
    part = local_part(value, empty, device)
    if not isinstance(empty, nn.Parameter):
        return part
    kind: Any = nn.Parameter if is_sharded(empty) else type(empty)
    return kind(part, requires_grad=empty.requires_grad)  # type: ignore[no-any-return]


def _tensors_on_meta(module: nn.Module) -> list[list[tuple[str, nn.Module, dict[str, Any], str]]]:
    """Where each tensor on the meta device is, tied ones together: name, owner, dict and key.

    Without 4-bit weights and adapters.
    """
    places = defaultdict(list)
    for name, owner in module.named_modules(remove_duplicate=False):
        of_layer: tuple[str, ...] = ()
        if isinstance(owner, PackedLayer):
            of_layer = (*BASE, *ADAPTER)
        for tensors in (owner._parameters, owner._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and tensor.is_meta and key not in of_layer:
                    places[id(tensor)].append((join(name, key), owner, tensors, key))
    return list(places.values())


def _device_of(module: nn.Module) -> torch.device:
    for parameter in module.parameters():
        if isinstance(parameter, DTensor) and parameter.device_mesh.device_type != "cpu":
            kind = parameter.device_mesh.device_type
            return torch.device(kind, torch.get_device_module(kind).current_device())
    return torch.device("cpu")
