"""Convert a module in place: choose linear layers, quantize them one after another, freeze the rest, report."""

import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric.utilities import rank_zero_info
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn
from tqdm import tqdm
from typing_extensions import Unpack

from lightning_qlora.adapters.adapter import Adapter
from lightning_qlora.adapters.conversion import Conversion, check_no_layer_resized, conversion_of, forget_merge
from lightning_qlora.adapters.module_adapter import config_of_adapter, set_adapter_of_module
from lightning_qlora.adapters.module_state import use_adapter_state_dict
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.arguments import QLoRAArguments
from lightning_qlora.checks import check_module
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.huggingface.patches import forget_quantizer
from lightning_qlora.layers.apply import add_tokens, convert_layer, freeze
from lightning_qlora.layers.changes import make_changes
from lightning_qlora.layers.copies import find_copies, share_seeds
from lightning_qlora.layers.deferred_head import check_output_embeddings, defer_output_embeddings, deferred_heads
from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.full_precision import Decide, hold_in_fp32, train_in_full_precision
from lightning_qlora.layers.held_types import reason_for_fp32
from lightning_qlora.layers.kinds import decode_packed_layer, is_packed
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import named
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.layers.records import record, unrecorded
from lightning_qlora.layers.selection import Row, SavedLayers, Selection, decide
from lightning_qlora.layers.selection_checks import check_names_in_loaded_models, check_selection
from lightning_qlora.layers.survey import Kind, Survey, survey
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
from lightning_qlora.training.gradient_checkpointing import budget_of, enable_gradient_checkpointing
from lightning_qlora.training.mapped_files import copy_from_files
from lightning_qlora.training.patches import shard_bytes
from lightning_qlora.training.report import ConversionReport, dense_bytes

IN_INIT = (
    "Folders in 8 or 4 bits are dequantized while they load in configure_model or plugin.init(): load the model there, "
    "and call load_from_checkpoint within plugin.init() of a plugin with the arguments of the training."
)


def convert(module: nn.Module, **arguments: Unpack[QLoRAArguments]) -> ConversionReport:
    """Turn a module's linear layers into frozen 4-bit layers with LoRA adapters, in place.

    Args:
        module: Any module, its weights loaded. If it was converted before, its layers stay as they are,
            and only layers that were added since are converted.
        **arguments: Those of `QLoRAPrecision` (see `QLoRAConfig`).

    Returns:
        What was converted, what was not and why, parameters and bytes before and after.

    Raises:
        TypeError, ValueError: If an argument is wrong, no layer can be converted, or a weight can't be quantized.

    Example:
        ```python
        import torch
        from lightning_qlora import convert
        from torch import nn

        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        print(convert(model, r=4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)  # trains the adapters
        ```
    """
    check_module("module", module)
    return convert_module(module, QLoRAConfig(**arguments))  # type: ignore[arg-type]  # takes a torch.dtype, too


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
    start = time.perf_counter()
    modules = dict(module.named_modules())
    check_initialized(modules.items())
    report = ConversionReport(bytes_before=dense_bytes(modules.values()))
    conversion = conversion_of(module)
    if conversion is not None and (run.evaluating or not unrecorded(module)):
        _convert_again(module, conversion, config)
        report.held_in_fp32 = hold_in_fp32(module, conversion.config.compute_dtype, run.device, run.decide)
        report.deferred_logits = deferred_heads(modules)
        report.count(module, modules)
    else:
        modules = _convert_new(module, config, run, saved, report)
    calibration = calibration_of(modules.values())
    report.calibration = None if calibration is None else calibration.report
    report.activations = budget_of(modules.values())
    report.seconds = time.perf_counter() - start
    return report


def _convert_new(
    module: nn.Module, config: QLoRAConfig, run: Run, saved: SavedLayers | None, report: ConversionReport
) -> dict[str, nn.Module]:
    """Convert what no conversion has seen, and fill the report; returns the modules by name, those that it made too."""
    seen = survey(module)
    for _, part in seen.modules:
        forget_merge(part)
        check_no_layer_resized(part)
    check_has_data(seen.modules, later=run.sharded or dist.is_initialized())
    new = unrecorded(module)
    first = not any(part.kind is Kind.CONVERTED for part in seen.parts)
    given = config
    adapter = None
    if config.adapter:
        adapter = read_adapter(config.adapter)
        config = config_of_adapter(module, adapter, config)
    if first:
        check_output_embeddings(dict(seen.modules), config.deferred_logits)
    choice = decide(seen, config, saved)
    check_selection(seen, config, choice, of_checkpoint=saved is not None)
    if adapter is None:
        check_names_in_loaded_models(seen, config)
    report.by_size = config.all_linear and saved is None and first and not seen.is_loaded
    check_before_conversion(seen, choice, config, first)
    copies = find_copies(seen, choice)
    share_seeds(choice, copies)
    warn_of_copies(copies)
    converted = _quantize(seen, choice, run.device)
    forget_quantizer(part for _, part in seen.modules)
    report.frozen = freeze(seen, choice, new, converted)
    add_tokens(seen, choice.tokens)
    modules = dict(module.named_modules())
    train_in_full_precision(module)
    report.held_in_fp32 = hold_in_fp32(module, config.compute_dtype, run.device, run.decide)
    if run.device is None or run.device.type == "cpu":  # else the strategy copies the module to its device
        copy_from_files(modules.items())
    record([*unrecorded(module), *new])  # what conversion made, and what was there
    _load_adapter_once(module, given.adapter, adapter)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(module, config.gradient_checkpointing, run.sharded)
    report.deferred_logits = defer_output_embeddings(modules, config.deferred_logits, run.sharded)
    make_changes("torch", "transformers")
    shard_bytes()
    use_adapter_state_dict(module, config, given)
    if config.init_kind.needs_data and converted:
        Calibration(module, run.sharded)
    report.take(choice)
    report.count(module, modules)
    warn_after_conversion(modules, choice, config, report, first)
    warn_of_slow_products(modules, run.device)
    return modules


def is_converted(module: nn.Module) -> bool:
    """Whether all of a module went through `convert_module`."""
    return conversion_of(module) is not None and not unrecorded(module)


def _load_adapter_once(module: nn.Module, folder: str | None, adapter: Adapter | None) -> None:
    """Load an adapter folder that an argument names; layers that had it last were trained since and stay.

    `adapter` is its content, if it was read before. On the meta device nothing happens: the folder is loaded when the
    layers have values, by `load_weights` or the next call.
    """
    if folder is None:
        return
    layers = adapted_layers(module).values()
    if all(layer.adapter_folder == folder or layer.lora_B.is_meta for layer in layers):
        return
    set_adapter_of_module(module, adapter or read_adapter(folder))
    for layer in layers:
        layer.adapter_folder = folder
    rank_zero_info(f"QLoRA: the adapters of this {type(module).__name__} are now those of {folder}.")


def _convert_again(module: nn.Module, conversion: Conversion, config: QLoRAConfig) -> None:
    _load_adapter_once(module, config.adapter, None)
    if config not in (conversion.config, *conversion.given):
        names = [name for name in config.__dataclass_fields__ if name not in ("paged_optimizer", "adapter")]
        warn_of_other_arguments(type(module).__name__, conversion.given[-1], config, names)
    if config not in conversion.given:
        conversion.given.insert(0, config)  # the last one is that of the conversion


def _quantize(seen: Survey, choice: Selection, device: torch.device | None) -> list[LoRALayer]:
    """Convert the chosen layers one after another, and return them; other layers in 4 bits become dense."""
    silent = bool(getattr(rank_zero_only, "rank", 0)) or None  # None: also where stderr is no terminal
    rows = choice.convert.values()
    layers = []
    for row in tqdm(rows, "Quantizing", leave=False, delay=2, unit=" layers", disable=silent):
        with named(row.name or type(row.owner).__name__):
            layers.append(_convert(row, device))
    for _, layer in seen.modules:
        if is_packed(layer):
            decode_packed_layer(layer)
    return layers


def _convert(row: Row, device: torch.device | None) -> LoRALayer:
    """Quantize a layer, or the experts of a parameter; what was quantized while loading gets its name and arguments."""
    loaded = row.owner if row.stack is None else row.stack.loaded
    if isinstance(loaded, LoRALayer):
        if not is_sharded(loaded.packed):  # else by a plan, while the model was loaded
            _check_not_sharded(loaded.lora_A)
        assert row.config is not None
        loaded.set_arguments(row.config, row.name, loaded.seed_name)
        loaded.loaded = False
        return loaded
    weight = row.owner._parameters.get(row.key)
    if weight is None:  # the parameters of another quantized format
        raise ValueError(f"has no float weight to quantize, but {', '.join(row.owner._parameters)}. {IN_INIT}")
    _check_not_sharded(weight)
    return convert_layer(row, device)


def _check_not_sharded(weight: Any) -> None:
    if is_sharded(weight):
        raise ValueError(
            "its weight is sharded already (a DTensor), and a shard can't be quantized. In configure_model, call "
            "self.trainer.precision_plugin.convert_module(self.model) before fully_shard or parallelize_module; in a "
            "loop of your own, lightning_qlora.convert(model). A model that configure_model loads with from_pretrained "
            "of transformers is in 4 bits already; pass no plan to it (tp_plan, distributed_config) elsewhere."
        )
