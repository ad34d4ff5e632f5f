"""Convert a module in place: choose linear layers, quantize them one after another, freeze the rest, report."""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.fabric.utilities import rank_zero_warn
from torch import nn
from torch.torch_version import TorchVersion
from typing_extensions import Unpack

from lightning_qlora.activations.gradient_checkpointing import enable_gradient_checkpointing
from lightning_qlora.adapters.load import config_of_adapter, load_adapter_once
from lightning_qlora.adapters.peft_folder import read_adapter
from lightning_qlora.arguments import QLoRAArguments
from lightning_qlora.calibration.calibration import calibration_of
from lightning_qlora.checkpoints.module_state import record_conversion
from lightning_qlora.checks import check_module
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.conversion.convert_checks import (
    check_has_data,
    check_loaded,
    differing_arguments,
    refuse_nothing,
)
from lightning_qlora.conversion.notes import (
    CONVERTED_BEFORE,
    note_after_conversion,
    note_before_conversion,
)
from lightning_qlora.conversion.parameter_counts import count_parameters
from lightning_qlora.conversion.report import ConversionReport
from lightning_qlora.dtypes.full_precision import Decide, hold, train_in_full_precision
from lightning_qlora.dtypes.instance_method import METHODS
from lightning_qlora.huggingface.patches import forget_quantizer
from lightning_qlora.logits.deferred_head import check_output_embeddings, defer_output_embeddings
from lightning_qlora.runs.patches import shard_bytes
from lightning_qlora.selection.apply import convert_layers, freeze
from lightning_qlora.selection.copies import find_copies, share_seeds
from lightning_qlora.selection.selection import SavedLayers, Selection, decide
from lightning_qlora.selection.selection_checks import FOREIGN, check_patterns, refuse_foreign_adapters
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.records import (
    MERGED,
    Conversion,
    conversion_of,
    record,
    record_rounded,
    unrecorded,
)
from lightning_qlora.survey.survey import Agree, Survey, survey
from lightning_qlora.tensors.device_types import held_type
from lightning_qlora.upstream_changes import make_changes


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
    config = QLoRAConfig(**arguments)  # type: ignore[arg-type]  # takes a torch.dtype, too
    report = convert_module(module, config)
    if report.notes:  # the caller may not print the report
        rank_zero_warn(f"rows of the report to look at:\n{report.marked_rows()}", stacklevel=5)
    return report


class Run(NamedTuple):
    """What the loop that a module runs in decides of its conversion."""

    device: torch.device | None = None  # where to quantize, and where it will be; None: where each weight is
    sharded: bool = False  # whether a strategy shards it afterwards: its logits are not deferred
    evaluating: bool = False  # whether it will not train, so that layers which were added later stay as they are
    decide: Decide = held_type  # in which type its device should hold another one
    is_one_of_several: bool = False  # whether it may be: Fabric sets up each module of a GAN, or an actor and a critic
    agree: Agree = lambda origins: origins  # whose random values decide what is new, if several ranks convert


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
    parts = Parts.of(module, wrappers=())
    report = ConversionReport(bytes_before=count_parameters(parts.modules).bytes_before)
    conversion = conversion_of(parts.root)
    if conversion is not None and (run.evaluating or not unrecorded(parts.modules)):
        _convert_again(parts, conversion, config)
        if parts.traits.has_16_bits:
            report.held = hold(parts.modules, conversion.config.compute_dtype, run.device, run.decide)
            record_rounded(parts.named)
        report.count(parts)
    else:
        parts = _convert_new(parts, config, run, saved, report)
    if any(layer.input_observer is not None for layer in parts.layers.values()):
        report.calibration = calibration_of(parts.modules, run.sharded)
    for name, part in parts.named:
        for method in vars(part).get(METHODS, ()):
            method.add_to_report(report, name)
    report.seconds = time.perf_counter() - start
    return report


def _convert_new(
    parts: Parts, config: QLoRAConfig, run: Run, saved: SavedLayers | None, report: ConversionReport
) -> Parts:
    """Convert what no conversion has seen, and fill the report; returns the parts with those that it made."""
    given = config
    adapter = None
    if config.adapter:
        adapter = read_adapter(config.adapter)
    seen = survey(parts, run.agree)
    if parts.traits.is_meta:
        check_has_data(parts.named, later=run.sharded or dist.is_initialized())
    if adapter is not None:
        config = config_of_adapter(parts, adapter, config)
    choice = _decide(seen, parts, config, saved, report, run)
    parts = _apply(seen, parts, choice, config, run, report)
    if given.adapter is not None:
        load_adapter_once(parts, given.adapter, adapter)
    record_conversion(parts, config, given)
    if config.deferred_logits is True or parts.traits.is_wide:
        report.deferred_logits = defer_output_embeddings(parts, config.deferred_logits, run.sharded)
    report.take(choice)
    report.count(parts)
    note_after_conversion(report, parts, choice)
    return parts


def _decide(
    seen: Survey,
    parts: Parts,
    config: QLoRAConfig,
    saved: SavedLayers | None,
    report: ConversionReport,
    run: Run,
) -> Selection:
    if config.deferred_logits is True and not seen.was_converted:
        check_output_embeddings(parts)
    choice = decide(seen, config, saved)
    if choice.some_rows is not None:
        choice.some_rows.check(choice.train)
    if choice.has_patterns and saved is None:  # the layers of a checkpoint were chosen without patterns
        check_patterns(seen, config, choice)
    if {name.lower() for name in seen.attributes} >= FOREIGN:
        refuse_foreign_adapters(seen, config, choice)
    if not choice.convert and not seen.was_converted:
        refuse_nothing(choice, config, run.is_one_of_several)
    if not parts.traits.is_new:
        check_loaded(seen, choice)
    copies = find_copies(parts, choice)
    if copies:
        share_seeds(choice, copies)
    note_before_conversion(report, seen, choice, config, copies)
    return choice


def _apply(
    seen: Survey, parts: Parts, choice: Selection, config: QLoRAConfig, run: Run, report: ConversionReport
) -> Parts:
    new = unrecorded(parts.modules)
    converted = convert_layers(seen, choice, run.device)
    if not parts.traits.is_new:
        for part in parts.modules:
            vars(part).pop(MERGED, None)
    if parts.models:
        forget_quantizer(parts.modules)
    report.frozen = freeze(seen, choice, new, converted)
    if choice.some_rows is not None:
        choice.some_rows.apply()
    module = parts.root
    parts = Parts.of(module, wrappers=())  # with the experts and the rows that train
    record([*unrecorded(parts.modules), *new])  # what conversion made, and what was there
    if parts.traits.has_16_bits:
        train_in_full_precision(parts.modules)
        report.held = hold(parts.modules, config.compute_dtype, run.device, run.decide)
        record_rounded(parts.named)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(module, config.gradient_checkpointing, run.sharded)
    make_changes("torch", "transformers")
    if torch.__version__ < TorchVersion("2.12"):
        shard_bytes()
    return parts


def is_converted(module: nn.Module) -> bool:
    return conversion_of(module) is not None and not unrecorded(module.modules())


def _convert_again(parts: Parts, conversion: Conversion, config: QLoRAConfig) -> None:
    if config.adapter is not None:
        load_adapter_once(parts, config.adapter)
    names = [name for name in config.__dataclass_fields__ if name not in ("paged_optimizer", "adapter")]
    other = differing_arguments(conversion.given[-1], config, names)
    if other and config not in (conversion.config, *conversion.given):
        rank_zero_warn(f"{type(parts.root).__name__} {CONVERTED_BEFORE.format(', '.join(other))}.")
    if config not in conversion.given:
        conversion.given.insert(0, config)  # the last one is that of the conversion
