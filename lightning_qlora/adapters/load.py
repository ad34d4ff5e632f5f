"""load_adapter: a module with the adapters of a PEFT folder, and the arguments that convert a module for one."""

import os
import re
import warnings
from dataclasses import replace
from statistics import mode

import torch
from lightning.fabric.utilities import rank_zero_info
from torch import nn

from lightning_qlora.adapters.adapter import PREFIX, Adapter, State
from lightning_qlora.adapters.base_compatibility import Quantization, check_required_base
from lightning_qlora.adapters.peft_config import ranks_and_alphas, round_alpha
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.adapters.peft_layers import from_peft, trained_modules
from lightning_qlora.checks import check_converted, first_of, shown
from lightning_qlora.config import QLoRAConfig, arguments_that
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.names import DELTA, join, only_child_of, owner_name, without_wrappers
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.records import conversion_of
from lightning_qlora.tensors.dtensor import is_sharded, reshard, shard_like
from lightning_qlora.tensors.values import has_values


def load_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load an adapter folder of PEFT or `save_adapter` into a converted module.

    Ranks and scalings become those of the folder; layers that are not in the folder get the default initialization,
    B = 0, and rows of tokens the values of the base model. What trains in full and is not in it keeps its values, with
    a warning. To convert exactly the layers of the folder, pass `adapter=folder` to `QLoRAPrecision` or `convert`
    instead.

    Args:
        module: A converted module, LightningModule or not.
        folder: The folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        FileNotFoundError, ValueError: If a file is missing or broken.
        CheckpointMismatchError: If the adapter does not fit the module; names the file and the key.

    Example:
        ```python
        from lightning_qlora import convert, load_adapter, save_adapter
        from torch import nn

        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        convert(model, r=4)
        save_adapter(model, "adapter")
        load_adapter(model, "adapter")
        ```
    """
    parts = Parts.of(module)
    reshard(parts.modules)
    with parts.inference_mode():
        adapter = read_adapter(folder)
        set_adapter(parts, adapter)
    trained = trained_modules(parts.base, parts.base)
    loaded = {trained.get(owner_name(key)) for key in adapter.saved}.union(parts.base.adapters.values())
    kept = [name for name, part in trained.items() if part not in loaded]
    if kept:
        warnings.warn(
            f"{folder} has no values for what trains in full, or has changed: {first_of(kept, 3)}. They stay as they "
            "are, which may be those of an earlier adapter. For the pretrained ones build the module again.",
            stacklevel=2,
        )


def set_adapter(parts: Parts, adapter: Adapter) -> None:
    """Set the adapters of a converted module, in place: the parameters stay the same objects.

    Raises CheckpointMismatchError as `load_adapter`.
    """
    base = parts.base
    layers = base.layers
    check_converted(parts.root, layers)
    loaded = from_peft(adapter, base)
    _check_fits(base, adapter, loaded)
    check_required_base(adapter, layers)
    initialization = (adapter.quantization or Quantization()).init_lora_weights
    for name, layer in layers.items():
        layer.stop_observing()
        if layer.initial is not None:
            layer.initial = None
        arguments = {"init_lora_weights": initialization, "use_rslora": adapter.config["use_rslora"]}
        state = loaded.get(name, {})
        if state:
            arguments |= {"r": state["lora_A"].shape[-2], "lora_alpha": adapter.alpha(name)}
        layer.set_config(layer.config.changed(**arguments))
        if not state:
            layer.reset_adapter()
        for key, value in state.items():
            layer.write(key, value.to(layer.lora_A.dtype).contiguous())
    for each in base.adapters.values():
        each.reset_rows(base.modules)
    if adapter.saved:
        tensors = _named_tensors(base)
        with torch.no_grad():
            for key, value in adapter.saved.items():
                tensors[key].copy_(shard_like(value, tensors[key]))
    usual = {  # checkpoints name what differs from these arguments layer by layer
        "r": mode(state["lora_A"].shape[-2] for state in loaded.values()),
        "lora_alpha": mode(round_alpha(adapter.alpha(name)) for name in loaded),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": adapter.config["use_rslora"],
    }
    for part in parts.modules:
        conversion = conversion_of(part)
        if conversion is not None:
            conversion.config = conversion.config.changed(**usual)


def _check_fits(base: Parts, adapter: Adapter, loaded: dict[str, State]) -> None:
    for name, state in loaded.items():
        key = f"{name}.lora_A.weight"
        layer = base.layers.get(name)
        if layer is None:
            adapter.refuse(key, base, "has no layer with an adapter there")
        r = state["lora_A"].shape[-2]
        if r != layer.r and is_sharded(layer.lora_A):
            raise CheckpointMismatchError(
                f"{adapter.source}: key '{PREFIX}{key}' has rank {r}, and the sharded layer keeps its rank {layer.r}. "
                "Pass adapter=FOLDER to QLoRAPrecision, which loads it before sharding."
            )
        if state.keys() != {*layer.parameter_names}:
            given = adapter.config["use_dora"]
            adapter.refuse(key, base, f"has use_dora={not given} there, and the adapter use_dora={given}")
    if not adapter.saved:
        return
    for name, rows in adapter.tokens.items():
        indices = base.rows_that_train.get(name)
        if rows != indices:
            difference = f"has trainable_token_indices={shown(indices)} there, and the adapter {shown(rows)}"
            adapter.refuse(f"{name}.{DELTA}", base, difference)
    for tied in tied_names(base):
        _check_tie(adapter, tied)
    tensors = _named_tensors(base)
    for key, value in adapter.saved.items():
        if key not in tensors:
            adapter.refuse(key, base, "has no such parameter")
        if tensors[key].shape != value.shape:
            adapter.refuse(key, base, f"has shape {list(tensors[key].shape)} there, the adapter {list(value.shape)}")


def tied_names(base: Parts) -> list[list[str]]:
    """The names of each parameter that has several; rows of embeddings that train are excluded, as PEFT ties them."""
    names: dict[int, list[str]] = {}
    for name, _, _, parameter in base.parameters:
        if not name.endswith(DELTA):
            names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _check_tie(adapter: Adapter, tied: list[str]) -> None:
    """Refuse an adapter with a value for some names of a tied weight only, or with different values.

    PEFT trains a copy of a module in modules_to_save and leaves the weight that it was tied to unchanged, unless
    `ensure_weight_tying` is set.
    """
    if adapter.has_one_value(tied):
        return
    trained = next(name for name in tied if name in adapter.saved)
    others = ", ".join(name for name in tied if name != trained)
    raise CheckpointMismatchError(
        f"{adapter.source}: key '{PREFIX}{trained}' was trained separately from {others}, and in this base they are "
        "one tied weight: it would be a different model. Train with ensure_weight_tying=True (PEFT's LoraConfig)."
    )


def _named_tensors(base: Parts) -> State:
    return {
        join(name, key): tensor
        for name, part in base.places
        for key, tensor in {**part._parameters, **part._buffers}.items()
        if tensor is not None
    }


def load_adapter_once(parts: Parts, folder: str, adapter: Adapter | None = None) -> None:
    """Load an adapter folder that an argument names; layers that had it last were trained since and stay.

    `adapter` is its content, if it was read before. On the meta device nothing happens: the folder is loaded when the
    layers have values, by `load_weights` or the next call.
    """
    layers = parts.layers.values()
    if all(layer.adapter_folder == folder or not has_values(layer.lora_B) for layer in layers):
        return
    set_adapter(parts, adapter or read_adapter(folder))
    for layer in layers:
        layer.adapter_folder = folder
    rank_zero_info(f"QLoRA: the adapters of this {type(parts.root).__name__} are now those of {folder}.")


def config_of_adapter(parts: Parts, adapter: Adapter, config: QLoRAConfig) -> QLoRAConfig:
    """`config` with the layers, ranks and scalings of the adapter; CheckpointMismatchError if the module lacks one."""
    prefix, base = _base_of(adapter, parts)
    layers = from_peft(adapter, base)
    ranks = {name: state["lora_A"].shape[-2] for name, state in layers.items()}
    alphas = {name: adapter.alpha(name) for name in layers}
    names = {without_wrappers(name): join(prefix, name) for name, _ in parts.inside(prefix)}
    names |= {name: join(prefix, name) for name, state in layers.items() if state["lora_A"].ndim == 3}
    owners = {owner_name(key) for key in adapter.saved}
    rows = {names.get(name, name): indices for name, indices in adapter.tokens.items()}
    function = {name: adapter.config[name] for name in arguments_that("of_function")}
    return replace(
        config.changed(init_lora_weights="default"),
        **(function | ranks_and_alphas(ranks, alphas, prefix)),
        target_modules="|".join(re.escape(names[name]) for name in layers),
        exclude_modules=[],
        modules_to_save=sorted(names[owner] for owner in owners if owner in names),
        trainable_token_indices=rows or None,
        adapter=None,
    )


def _base_of(adapter: Adapter, parts: Parts) -> tuple[str, Parts]:
    """The base model, which has the layers of the adapter, and its name; some may be beside a transformers model."""
    for name in (parts.base_name, only_child_of(parts.root) or ""):
        base = parts.part(name)
        if adapter.modules.keys() <= dict(base.named).keys():
            return name, base
    return parts.base_name, parts.base
