"""Adapters of a module to PEFT's folder and back."""

import math
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn, get_args

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_qlora import starts
from lightning_qlora.adapters.base_model import describe_base, find_base, plain_name, trained_in_full
from lightning_qlora.adapters.float_base import for_float_base
from lightning_qlora.adapters.folder import MAGNITUDE, PREFIX, Adapter, LayerAdapter, read_adapter, write_adapter
from lightning_qlora.adapters.kept_start import check_start_fits, keep_start
from lightning_qlora.adapters.ties import tie_broken, tied_names, trained_apart
from lightning_qlora.calibration import close_calibrations
from lightning_qlora.config import Onto, QLoRAConfig, check_choice
from lightning_qlora.linear import QLoRALinear, adapted_layers
from lightning_qlora.linear_state import CheckpointMismatchError
from lightning_qlora.sharded import is_sharded, like, reshard, whole
from lightning_qlora.starts.since_start import Origin, belongs_to


def save_adapter(
    module: nn.Module,
    folder: str | os.PathLike[str],
    onto: Onto = "decoded",
    base: str | os.PathLike[str] | None = None,
) -> None:
    """Write a module's adapters as `peft.PeftModel.from_pretrained(base, folder)` reads them.

    Names are those of the transformers model inside the module, so the folder fits the model without Lightning. Where
    ranks hold shards, call it on all of them; rank 0 writes.

    Args:
        module: A converted module, LightningModule or not.
        folder: Where to; files of the same names are replaced, each in one step.
        onto: The base that the folder is for. "decoded": in 4 bits, as in training (an adapter that started at B = 0
            does for both); "float": in 16 or 32 bit, which takes rank 2 r where the start was another.
        base: For "float": folder or hub name of the base; None: what the transformers model was loaded from.

    Raises:
        ValueError: If there is no adapter, or PEFT has no words for what was trained.
    """
    check_choice("onto", onto, get_args(Onto))
    reshard(module)
    adapter = adapter_of(module)
    if onto == "float":
        adapter = for_float_base(adapter, base)
    elif need := belongs_to(adapter.quantization):
        warnings.warn(need, stacklevel=2)
    rank_zero_only(write_adapter)(adapter, folder)


def load_adapter(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Give a converted module the adapter in a folder that PEFT or `save_adapter` wrote; other adapters become zero.

    Ranks and scalings become the folder's. To convert the very layers the folder has adapters for, pass
    `adapter=folder` to `QLoRAPrecision` or `convert` instead.

    Raises:
        FileNotFoundError, ValueError: If a file is missing or broken.
        CheckpointMismatchError: If the adapter does not fit the module; names the file and the key.
    """
    reshard(module)
    put_adapter(module, read_adapter(folder))


def adapter_of(module: nn.Module) -> Adapter:
    """A module's adapters as a value, with names as the base model has them."""
    _, base = find_base(module)
    layers = _adapted_layers(base)
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no adapter. Convert it first: Trainer.fit and fabric.setup do so with "
            "plugins=QLoRAPrecision(), or by lightning_qlora.convert(module)."
        )
    first = next(iter(layers.values()))
    rslora = first.config.use_rslora
    about = describe_base(module)
    saved = {name: dict(_state(part)) for name, part in trained_in_full(base)}
    if "" in saved:
        raise ValueError(
            f"A parameter of the {type(base).__name__} itself trains, and PEFT's modules_to_save can only name modules "
            "inside it. Freeze it, or keep a Lightning checkpoint instead of a PEFT folder."
        )
    return Adapter(
        layers={
            name: LayerAdapter(
                whole(layer.lora_A).detach(),
                whole(layer.lora_B).detach(),
                layer.scaling * (math.sqrt(layer.r) if rslora else layer.r),
                None if layer.lora_magnitude_vector is None else whole(layer.lora_magnitude_vector).detach(),
            )
            for name, layer in layers.items()
        },
        saved={f"{name}.{key}": value for name, state in saved.items() for key, value in state.items()},
        modules_to_save=_checked_endings(list(saved), base),
        targets=about["target_modules"],
        use_rslora=rslora,
        fan_in_fan_out=about["fan_in_fan_out"],
        lora_dropout=first.lora_dropout,
        task_type=about["task_type"],
        base_model=about["base_model"],
        quantization=about["quantization"],
        bases={name: layer.packed_weight for name, layer in layers.items() if starts.moves_base(layer.config)},
        origin=Origin(
            first.config,
            {name: layer.full_name for name, layer in layers.items()},
            {name: layer.input_rms for name, layer in layers.items() if layer.input_rms is not None},
            lambda name: layers[name].base_fingerprint(),
        ),
        source=type(module).__name__,
    )


def put_adapter(module: nn.Module, adapter: Adapter) -> None:
    """Make a converted module's adapters those of `adapter`, in place; the parameters stay the same objects."""
    _, base = find_base(module)
    layers = _adapted_layers(base)
    _check_fits(base, layers, adapter)
    check_start_fits(adapter, layers)
    for name, layer in layers.items():
        layer.config, layer.input_rms = replace(layer.config, use_rslora=adapter.use_rslora), None
        keep_start(layer, adapter.quantization)
        loaded = adapter.layers.get(name)
        if loaded is None:
            layer.lora_B.data.zero_()
            continue
        values = {"lora_A": loaded.lora_A, "lora_B": loaded.lora_B, MAGNITUDE: loaded.magnitude}
        for key, value in values.items():
            if value is not None:
                layer.write(key, value.to(layer.lora_A.dtype).contiguous())
        layer.scaling = adapter.scaling(name)
    state = _named_state(base)
    with torch.no_grad():
        for key, value in adapter.saved.items():
            state[key].copy_(like(value, state[key]))
    close_calibrations(module)  # no adapter waits for data any more
    for part in module.modules():
        config = getattr(part, "_qlora_config", None)
        if isinstance(config, QLoRAConfig):  # checkpoints say what the adapter is
            part._qlora_config = replace(config, **_words(part, adapter, layers))  # type: ignore[assignment]


def config_of_adapter(module: nn.Module, adapter: Adapter, config: QLoRAConfig) -> QLoRAConfig:
    """`config` with the adapter's choice of layers, ranks and scaling in place of its own.

    Raises:
        CheckpointMismatchError: If the module lacks a layer that the adapter is for.
    """
    prefix, base = find_base(module)
    names = {plain_name(name): f"{prefix}.{name}".strip(".") for name, _ in base.named_modules()}
    missing = [name for name in adapter.layers if name not in names]
    if missing:
        _refuse(adapter, f"{missing[0]}.lora_A.weight", base, "has no such layer")
    owners = {key.rpartition(".")[0] for key in adapter.saved}
    return replace(
        config.with_start("default"),
        **_words(module, adapter, {}),
        use_dora=adapter.use_dora,
        target_modules="|".join(re.escape(names[name]) for name in adapter.layers),
        exclude_modules=[],
        modules_to_save=sorted(names[owner] for owner in owners if owner in names),
        adapter=None,
    )


def adapter_within(module: nn.Module, adapter: Adapter) -> Adapter | None:
    """The adapter of the layers that a part of the adapter's model has; None if it has none of them."""
    base = find_base(module)[1]
    names = {plain_name(name) for name, _ in base.named_modules()}
    layers = {name: layer for name, layer in adapter.layers.items() if name in names}
    saved = {key: value for key, value in adapter.saved.items() if key.rpartition(".")[0] in names}
    return replace(adapter, layers=layers, saved=saved) if layers else None


def _words(module: nn.Module, adapter: Adapter, others: dict[str, QLoRALinear]) -> dict[str, Any]:
    """Ranks and scalings of the adapter, and ranks of the other layers, as arguments of a QLoRAConfig."""
    prefix = find_base(module)[0]
    ranks = adapter.rank_pattern | {n: x.r for n, x in others.items() if n not in adapter.layers and x.r != adapter.r}

    def full(name: str) -> str:
        return re.escape(f"{prefix}.{name}".strip("."))

    return {
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.use_rslora,
        "rank_pattern": {full(name): r for name, r in ranks.items()},
        "alpha_pattern": {full(name): alpha for name, alpha in adapter.alpha_pattern.items()},
    }


def _adapted_layers(base: nn.Module) -> dict[str, QLoRALinear]:
    return {plain_name(name): layer for name, layer in adapted_layers(base).items()}


def _state(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What PEFT saves of a module: its own parameters and persistent buffers."""
    for key, value in {**part._parameters, **part._buffers}.items():
        if value is not None and key not in part._non_persistent_buffers_set:
            yield key, whole(value).detach()


def _named_state(base: nn.Module) -> dict[str, Tensor]:
    everything: dict[str, Any] = {
        **dict(base.named_parameters(remove_duplicate=False)),
        **dict(base.named_buffers(remove_duplicate=False)),
    }
    return {plain_name(name): value for name, value in everything.items()}


def _checked_endings(names: list[str], base: nn.Module) -> list[str]:
    """PEFT wraps every module whose name ends in one of modules_to_save, dot or no dot before the ending."""
    for name in names:
        also = [n for n, _ in base.named_modules() if plain_name(n).endswith(name) and plain_name(n) not in names]
        if also:
            raise ValueError(
                f"{name!r} was trained in full, and PEFT would take {also[0]!r}, whose name ends the same, for another "
                "such module. Rename one of them, or keep a Lightning checkpoint instead of a PEFT folder."
            )
    return sorted(names)


def _check_fits(base: nn.Module, layers: dict[str, QLoRALinear], adapter: Adapter) -> None:
    modules = {plain_name(name): part for name, part in base.named_modules()}
    for name, loaded in adapter.layers.items():
        layer, key = layers.get(name), f"{name}.lora_A.weight"
        if layer is None:
            part = modules.get(name)
            what = "has no such layer" if part is None else f"has a {type(part).__name__} without an adapter there"
            _refuse(adapter, key, base, what)
        if loaded.lora_A.shape[1] != layer.in_features or loaded.lora_B.shape[0] != layer.out_features:
            _refuse(
                adapter, key, base,
                f"has a layer of {layer.in_features} inputs and {layer.out_features} outputs there, the adapter is for "
                f"{loaded.lora_A.shape[1]} and {loaded.lora_B.shape[0]}",
            )  # fmt: skip
        if is_sharded(layer.lora_A) and loaded.lora_A.shape != layer.lora_A.shape:
            raise CheckpointMismatchError(
                f"{adapter.source}: key '{PREFIX}{key}' has rank {loaded.lora_A.shape[0]}, and the sharded layer keeps "
                f"its rank {layer.r}. Pass adapter=FOLDER to QLoRAPrecision, which takes it before sharding."
            )
        if (loaded.magnitude is None) != (layer.lora_magnitude_vector is None):
            with_dora, without = ("here", "the adapter") if loaded.magnitude is None else ("the adapter", "here")
            _refuse(adapter, key, base, f"differs in DoRA ({with_dora}: yes, {without}: no); set use_dora accordingly")
    for tied in tied_names(base):
        if trained_apart(adapter, tied):
            raise CheckpointMismatchError(tie_broken(adapter, tied))
    state = _named_state(base)
    for key, value in adapter.saved.items():
        if key not in state:
            _refuse(adapter, key, base, "has no such parameter")
        if state[key].shape != value.shape:
            _refuse(adapter, key, base, f"has shape {list(state[key].shape)} there, the adapter {list(value.shape)}")


def _refuse(adapter: Adapter, key: str, base: nn.Module, what: str) -> NoReturn:
    raise CheckpointMismatchError(
        f"{adapter.source}: key '{PREFIX}{key}' does not fit: the {type(base).__name__} {what}. An adapter fits the "
        "architecture it was trained on, converted with its target_modules (pass adapter=FOLDER to QLoRAPrecision)."
    )
