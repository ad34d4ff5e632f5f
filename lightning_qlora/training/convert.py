"""Convert a module in place: choose linear layers, quantize them one after another, freeze the rest, report."""

import time
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn
from tqdm import tqdm

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.adapters.conversion import Conversion, check_no_layer_resized, conversion_of, forget_merge
from lightning_qlora.adapters.module_adapter import config_of_adapter, set_adapter_of_module
from lightning_qlora.adapters.module_state import use_adapter_state_dict
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.checks import check_module
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.huggingface.patches import forget_quantizer
from lightning_qlora.layers.candidate import SavedLayers
from lightning_qlora.layers.changes import make_changes
from lightning_qlora.layers.copies import find_copies, share_seeds
from lightning_qlora.layers.deferred_head import check_output_embeddings, defer_output_embeddings, deferred_heads
from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.experts import ExpertParameter
from lightning_qlora.layers.full_precision import Decide, hold_in_fp32, train_in_full_precision
from lightning_qlora.layers.held_types import reason_for_fp32
from lightning_qlora.layers.kinds import decode_packed_layer, is_packed
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import join, named
from lightning_qlora.layers.provenance import loaded_models
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.layers.records import Unrecorded, own_parameters, record, unrecorded
from lightning_qlora.layers.selection import IN_MODULES_TO_SAVE, TRAIN, Selection, ToConvert, select_layers
from lightning_qlora.layers.selection_checks import check_names_in_loaded_models, check_selection
from lightning_qlora.layers.trainable_tokens import train_tokens
from lightning_qlora.training.calibration import Calibration, calibration_of
from lightning_qlora.training.convert_checks import (
    check_before_conversion,
    check_has_data,
    check_initialized,
    warn_after_conversion,
    warn_of_copies,
    warn_of_other_arguments,
    warn_of_slow_products,
)
from lightning_qlora.training.gradient_checkpointing import enable_gradient_checkpointing
from lightning_qlora.training.mapped_files import copy_from_files
from lightning_qlora.training.patches import shard_bytes
from lightning_qlora.training.report import ConversionReport, dense_bytes

IN_INIT = (
    "Folders in 8 or 4 bits are dequantized while they load in configure_model or plugin.init(): load the model there, "
    "and call load_from_checkpoint within plugin.init() of a plugin with the arguments of the training."
)


def convert(module: nn.Module, **arguments: Any) -> ConversionReport:
    """Turn a module's linear layers into frozen 4-bit layers with LoRA adapters, in place.

    Args:
        module: Any module, its weights loaded. If it was converted before, its layers stay as they are,
            and only layers that were added since are converted.
        **arguments: Those of `QLoRAPrecision` (see `QLoRAConfig`).

    Returns:
        What was converted, what was not and why, parameters and bytes before and after.

    Raises:
        TypeError, ValueError: If an argument is wrong, no layer can be converted, or a weight can't be quantized.
    """
    check_module("module", module)
    return convert_module(module, QLoRAConfig(**arguments))


class Run(NamedTuple):
    """What the loop that a module runs in decides of its conversion."""

    device: torch.device | None = None  # where to quantize, and where it will be; None: where each weight is
    sharded: bool = False  # whether a strategy shards it afterwards: its logits are not deferred
    evaluating: bool = False  # whether it will not train, so that layers which were added later stay as they are
    decide: Decide = reason_for_fp32  # why its device should hold a type in fp32


OWN_LOOP = Run()


@torch.inference_mode(False)  # a parameter that is made in it can never train
def convert_module(
    module: nn.Module, config: QLoRAConfig, run: Run = OWN_LOOP, saved: SavedLayers | None = None
) -> ConversionReport:
    """`convert` with a config. `saved`: convert these layers of a checkpoint; None: those that the arguments choose.

    Layers that an earlier conversion made, of this module or of a part of it, stay as they are. Layers that were added
    since are converted.
    """
    check_initialized(module)
    start = time.perf_counter()
    report = ConversionReport(bytes_before=dense_bytes(module))
    conversion = conversion_of(module)
    if conversion is not None and (run.evaluating or not unrecorded(module)):
        _convert_again(module, conversion, config)
        report.held_in_fp32 = hold_in_fp32(module, conversion.config.compute_dtype, run.device, run.decide)
        report.deferred_logits = deferred_heads(module)
        report.count(module)
    else:
        _convert_new(module, config, run, saved, report)
    calibration = calibration_of(module)
    report.calibration = None if calibration is None else calibration.report
    report.seconds = time.perf_counter() - start
    return report


def _convert_new(
    module: nn.Module, config: QLoRAConfig, run: Run, saved: SavedLayers | None, report: ConversionReport
) -> None:
    """Convert what no conversion has seen, and fill the report."""
    forget_merge(module)
    for part in module.modules():
        check_no_layer_resized(part)
    check_has_data(module, later=run.sharded or dist.is_initialized())
    new = unrecorded(module)
    kept = [layer for layer in adapted_layers(module).values() if not layer.loaded]
    given = config
    adapter = None
    if config.adapter:
        adapter = read_adapter(config.adapter)
        config = config_of_adapter(module, adapter, config)
    if not kept:
        check_output_embeddings(module, config.deferred_logits)
    choice = select_layers(module, config, saved)
    check_selection(module, config, choice, of_checkpoint=saved is not None)
    if adapter is None:
        check_names_in_loaded_models(module, config, choice)
    report.by_size = config.all_linear and saved is None and not kept and not loaded_models(module)
    check_before_conversion(module, choice, config, first=not kept)
    copies = find_copies(module, choice)
    share_seeds(choice, copies)
    warn_of_copies(copies)
    _quantize(module, choice, run.device)
    forget_quantizer(module)
    report.trained_in_full = choice.train
    report.skipped = choice.skip
    report.frozen = freeze(module, choice, new, kept)
    _add_tokens(module, choice)
    train_in_full_precision(module)
    report.held_in_fp32 = hold_in_fp32(module, config.compute_dtype, run.device, run.decide)
    if run.device is None or run.device.type == "cpu":  # else the strategy copies the module to its device
        copy_from_files(module)
    record([*unrecorded(module), *new])  # what conversion made, and what was there
    _load_adapter_once(module, given.adapter, adapter)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(module)
    report.deferred_logits = defer_output_embeddings(module, config.deferred_logits, run.sharded)
    make_changes("torch", "transformers")
    shard_bytes()
    use_adapter_state_dict(module, config, given)
    if config.init_kind.needs_data and choice.convert:
        Calibration(module, run.sharded)
    report.count(module)
    warn_after_conversion(module, choice, config, report, first=not kept)
    warn_of_slow_products(module, run.device)


def is_converted(module: nn.Module) -> bool:
    """Whether all of a module went through `convert_module`."""
    return conversion_of(module) is not None and not unrecorded(module)


def _load_adapter_once(module: nn.Module, folder: str | None, adapter: Adapter | None) -> None:
    """Load an adapter folder that an argument names; layers that had it last were trained since and stay.

    `adapter` is its content, if it was read before. On the meta device nothing happens: the folder is loaded when the
    layers have values, by `load_weights` or the next call.
    """
    layers = adapted_layers(module).values()
    if folder is None or all(layer.adapter_folder == folder or layer.lora_B.is_meta for layer in layers):
        return
    set_adapter_of_module(module, adapter or read_adapter(folder))
    for layer in layers:
        layer.adapter_folder = folder
    rank_zero_info(f"QLoRA: the adapters of this {type(module).__name__} are now those of {folder}.")


def _convert_again(module: nn.Module, conversion: Conversion, config: QLoRAConfig) -> None:
    """Load the adapter folder of the arguments, if another one was loaded last; warn of other arguments."""
    _load_adapter_once(module, config.adapter, None)
    if config not in (conversion.config, *conversion.given):
        names = [name for name in config.__dataclass_fields__ if name not in ("paged_optimizer", "adapter")]
        warn_of_other_arguments(type(module).__name__, conversion.given[-1], config, names)
    if config not in conversion.given:
        conversion.given.insert(0, config)  # the last one is that of the conversion


def _quantize(module: nn.Module, choice: Selection, device: torch.device | None) -> None:
    """Convert the chosen layers one after another; other layers in 4 bits become dense."""
    silent = bool(getattr(rank_zero_only, "rank", 0)) or None  # None: also where stderr is no terminal
    layers = choice.convert.items()
    for name, chosen in tqdm(layers, "Quantizing", leave=False, delay=2, unit=" layers", disable=silent):
        with named(name or type(chosen.part).__name__):
            _convert(chosen, device)
    for layer in module.modules():
        if is_packed(layer):
            decode_packed_layer(layer)


def _convert(chosen: ToConvert, device: torch.device | None) -> None:
    """Quantize a layer, or the experts of a parameter; what was quantized while loading gets its name and arguments."""
    loaded = chosen.part.loaded if isinstance(chosen.part, ExpertParameter) else chosen.part
    if isinstance(loaded, LoRALayer):
        if not is_sharded(loaded.packed):  # else by a plan, while the model was loaded
            _check_not_sharded(loaded.lora_A)
        loaded.set_arguments(chosen.config, chosen.name, loaded.seed_name)
        loaded.loaded = False
        return
    owner, key = chosen.place
    weight = owner._parameters.get(key)
    if weight is None:  # the parameters of another quantized format
        raise ValueError(f"has no float weight to quantize, but {', '.join(owner._parameters)}. {IN_INIT}")
    _check_not_sharded(weight)
    chosen.convert(device)


def _check_not_sharded(weight: Any) -> None:
    if is_sharded(weight):
        raise ValueError(
            "its weight is sharded already (a DTensor), and a shard can't be quantized. In configure_model, call "
            "self.trainer.precision_plugin.convert_module(self.model) before fully_shard or parallelize_module; in a "
            "loop of your own, lightning_qlora.convert(model). A model that configure_model loads with from_pretrained "
            "of transformers is in 4 bits already; pass no plan to it (tp_plan, distributed_config) elsewhere."
        )


def freeze(module: nn.Module, choice: Selection, new: Iterable[Unrecorded], kept: Collection[LoRALayer]) -> list[str]:
    """Let only the adapters, and what was chosen to train in full, train; returns what trained and is frozen now.

    `new` are the parameters that no earlier conversion has seen; others do not change, except in modules_to_save.
    `kept` are the layers of an earlier conversion, which do not change. Linear layers are not in the result.
    """
    decisions = choice.of_parameters(module)
    name_of = {part: name for name, part in module.named_modules()}
    frozen: dict[str, None] = {}
    for owner, key, trained, _ in new:
        weight = own_parameters(owner).get(key)
        if weight is None or not (weight.is_floating_point() or weight.is_complex()):
            continue
        decision = decisions.get(id(weight))
        weight.requires_grad_(decision is not None and decision.action == TRAIN)
        if trained and decision is None:
            frozen[join(name_of[owner], key if owner._modules else "")] = None
    trains = {key for key, decision in decisions.items() if decision.reason == IN_MODULES_TO_SAVE}
    for layer in {*adapted_layers(module).values()} - {*kept}:
        trains |= {id(parameter) for parameter in layer.adapter_parameters()}
    for parameter in module.parameters():
        if id(parameter) in trains and parameter.is_floating_point():
            parameter.requires_grad_(True)
    return list(frozen)


def _add_tokens(module: nn.Module, choice: Selection) -> None:
    """Let the chosen rows of frozen embeddings train."""
    tied: dict[int, list[str]] = {}
    for name in choice.tokens:
        weight = module.get_submodule(name)._parameters.get("weight")
        tied.setdefault(id(weight), []).append(name)
    for names in tied.values():
        train_tokens([module.get_submodule(name) for name in names], choice.tokens[names[0]])
