"""The adapters of a module as a value, and a module with the adapters of a value."""

import re
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from lightning_qlora.checkpoints.base_model import describe_base, tied_names, trained_modules
from lightning_qlora.checkpoints.conversion import check_layers_of_conversions, conversion_of
from lightning_qlora.checks import NOT_FINITE, check_converted, shown
from lightning_qlora.config import Base, QLoRAConfig, arguments_that
from lightning_qlora.layers.layer_state import CheckpointMismatchError
from lightning_qlora.layers.lora_layer import ADAPTER, INITIAL, LoRALayer
from lightning_qlora.layers.names import DELTA, join, only_child_of, owner_name, without_wrappers
from lightning_qlora.peft.adapter import PREFIX, Adapter, State
from lightning_qlora.peft.base_compatibility import Quantization, check_required_base
from lightning_qlora.peft.peft_config import ranks_and_alphas
from lightning_qlora.peft.peft_layers import from_peft, refuse, to_peft
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.provenance import set_origins
from lightning_qlora.tensors.dtensor import gather, is_sharded, local, of_all_ranks, shard_like


def inference_mode_of(parts: Parts) -> torch.inference_mode:
    """Inference mode if a module was made in it, else none: a parameter that is made in it can never train."""
    values = (value for part in parts.modules for value in part._parameters.values() if value is not None)
    return torch.inference_mode(any(value.is_inference() for value in values))


def check_adapters_finite(parts: Parts) -> None:
    """Raise ValueError if an adapter of a module holds NaN or Inf; all ranks of a sharded module must call it.

    Such adapters are neither saved nor merged: the model would compute NaN, and readers refuse the file.
    """
    parameters = {name: adapter.adapter_parameters() for name, adapter in parts.adapters.items()}
    bad = [name for name, of_one in parameters.items() if not all(_is_finite(p) for p in of_one)]
    if any(map(is_sharded, chain.from_iterable(parameters.values()))):
        bad = list(dict.fromkeys(chain.from_iterable(of_all_ranks(bad))))
    if bad:
        trainer = vars(parts.root).get("_trainer")  # of a LightningModule
        step = ""
        if trainer is not None:
            step = f" after step {trainer.global_step}"
        raise ValueError(
            f"{bad[0] or type(parts.root).__name__}: its adapter {NOT_FINITE}{step}, as those of {len(bad)} of "
            f"{len(parameters)} layers: the training diverged. Nothing was written, and earlier files stay. Go on from "
            "an earlier checkpoint, with a smaller learning rate, or compute_dtype='bf16' in place of fp16; look for "
            "NaN in the batches."
        )


def _is_finite(parameter: nn.Parameter) -> bool:
    return bool(torch.isfinite(local(parameter.detach())).all())


def get_adapter(parts: Parts, base: Base = "quantized") -> Adapter:
    """The adapters of a module as a PEFT folder for this base; names are those in the base model.

    ValueError if PEFT's format has no place for what trained.
    """
    base_model = parts.base
    layers = base_model.layers
    check_layers_of_conversions(parts)
    check_converted(parts.root, layers)
    check_adapters_finite(parts)
    trained = trained_modules(base_model, parts.unchanged)
    if "" in trained:
        raise ValueError(
            f"A parameter of the {type(base_model.root).__name__} itself trains, and PEFT's modules_to_save can only "
            "name modules inside it. Freeze it, or use a Lightning checkpoint instead of a PEFT folder."
        )
    if trained:
        _check_endings(list(trained), base_model)
    saved: State = {}
    for name, part in trained.items():
        saved |= {f"{name}.{key}": value for key, value in _state_of(part).items()}
    first = next(iter(layers.values()))
    return to_peft(
        describe_base(parts, first.config, trained),
        {name: layer.config for name, layer in layers.items()},
        {name: _state_of_layer(layer) for name, layer in layers.items()},
        Quantization.of(first),
        base,
        saved=saved,
        fingerprints={name: layer.base_fingerprint() for name, layer in layers.items()},
        source=type(parts.root).__name__,
    )


def _state_of_layer(layer: LoRALayer) -> State:
    values = {name: getattr(layer, name) for name in (*ADAPTER, *INITIAL)}
    return {name: gather(value).detach() for name, value in values.items() if value is not None}


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
        if layer.initial_A is not None:
            layer.set_initial(None)
        arguments = {"init_lora_weights": initialization, "use_rslora": adapter.config["use_rslora"]}
        state = loaded.get(name, {})
        if state:
            arguments |= {"r": state["lora_A"].shape[-2], "lora_alpha": adapter.alpha(name)}
        layer.set_config(layer.config.changed(**arguments))
        if not state:
            layer.reset_adapter()
        for key, value in state.items():
            layer.write(key, value.to(layer.lora_A.dtype).contiguous())
    if adapter.saved:
        tensors = _named_tensors(base)
        with torch.no_grad():
            for key, value in adapter.saved.items():
                tensors[key].copy_(shard_like(value, tensors[key]))
    for part in parts.modules:
        conversion = conversion_of(part)
        if conversion is not None:  # checkpoints name what differs from these arguments layer by layer
            arguments = _ranks_and_alphas(adapter, loaded) | {"rank_pattern": {}, "alpha_pattern": {}}
            conversion.config = conversion.config.changed(**arguments, use_rslora=adapter.config["use_rslora"])


def _ranks_and_alphas(adapter: Adapter, layers: dict[str, State], prefix: str = "") -> dict[str, Any]:
    ranks = {name: state["lora_A"].shape[-2] for name, state in layers.items()}
    return ranks_and_alphas(ranks, {name: adapter.alpha(name) for name in layers}, prefix)


def set_origins_of_base(parts: Parts, adapter: Adapter) -> None:
    """Before a conversion for an adapter: it says what trains in its base model, so values are not asked there."""
    _, base = _base_of(adapter, parts)
    set_origins(base, {without_wrappers(name): "" for name, _, _, _ in base.parameters})


def config_of_adapter(parts: Parts, adapter: Adapter, config: QLoRAConfig) -> QLoRAConfig:
    """`config` with the layers, ranks and scalings of the adapter; CheckpointMismatchError if the module lacks one."""
    prefix, base = _base_of(adapter, parts)
    layers = from_peft(adapter, base)
    names = {without_wrappers(name): join(prefix, name) for name, _ in parts.inside(prefix)}
    names |= {name: join(prefix, name) for name, state in layers.items() if state["lora_A"].ndim == 3}
    owners = {owner_name(key) for key in adapter.saved}
    rows = {names.get(name, name): indices for name, indices in adapter.tokens.items()}
    function = {name: adapter.config[name] for name in arguments_that("of_function")}
    return replace(
        config.with_initialization("default"),
        **(function | _ranks_and_alphas(adapter, layers, prefix)),
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


def _named_tensors(base: Parts) -> State:
    return {
        join(name, key): tensor
        for name, part in base.places
        for key, tensor in {**part._parameters, **part._buffers}.items()
        if tensor is not None
    }


def _state_of(part: nn.Module) -> State:
    """The tensors that PEFT saves of a module: its direct parameters and persistent buffers."""
    return {
        key: gather(value).detach()
        for key, value in {**part._parameters, **part._buffers}.items()
        if value is not None and key not in part._non_persistent_buffers_set
    }


def _check_endings(names: list[str], base: Parts) -> None:
    """Refuse names that are the ending of another module's name: PEFT's modules_to_save would select both."""
    for name in names:
        others = [other for other, _ in base.named if other.endswith(name) and other not in names]
        if others:
            raise ValueError(
                f"{name!r} was trained in full, and PEFT would also select {others[0]!r}, whose name ends the same: "
                "its modules_to_save has no form for one alone. Use a Lightning checkpoint, or merge the adapters."
            )


def _check_fits(base: Parts, adapter: Adapter, loaded: dict[str, State]) -> None:
    for name, state in loaded.items():
        key = f"{name}.lora_A.weight"
        layer = base.layers.get(name)
        if layer is None:
            refuse(adapter, key, base, "has no layer with an adapter there")
        r = state["lora_A"].shape[-2]
        if is_sharded(layer.lora_A) and r != layer.r:
            raise CheckpointMismatchError(
                f"{adapter.source}: key '{PREFIX}{key}' has rank {r}, and the sharded layer keeps its rank {layer.r}. "
                "Pass adapter=FOLDER to QLoRAPrecision, which loads it before sharding."
            )
        if state.keys() != {*layer.parameter_names}:
            given = adapter.config["use_dora"]
            refuse(adapter, key, base, f"has use_dora={not given} there, and the adapter use_dora={given}")
    for name, rows in adapter.tokens.items():
        indices = base.rows_that_train.get(name)
        if rows != indices:
            difference = f"has trainable_token_indices={shown(indices)} there, and the adapter {shown(rows)}"
            refuse(adapter, f"{name}.{DELTA}", base, difference)
    if not adapter.saved:
        return
    for tied in tied_names(base):
        _check_tie(adapter, tied)
    tensors = _named_tensors(base)
    for key, value in adapter.saved.items():
        if key not in tensors:
            refuse(adapter, key, base, "has no such parameter")
        if tensors[key].shape != value.shape:
            refuse(adapter, key, base, f"has shape {list(tensors[key].shape)} there, the adapter {list(value.shape)}")


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
