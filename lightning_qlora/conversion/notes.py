"""What a user should look at after a conversion: rows of the report with a mark."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import nn

from lightning_qlora.adapters.base_compatibility import check_one_folder
from lightning_qlora.checks import TRAIN_IN_FULL
from lightning_qlora.config import QLoRAConfig, arguments_that
from lightning_qlora.conversion.convert_checks import differing_arguments, no_layer
from lightning_qlora.conversion.report import NOTHING_PRETRAINED, ConversionReport
from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.names import join, outer_names, tensors_of
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.selection.copies import Copy
from lightning_qlora.selection.selection import FROZEN, IN_VAIN, Selection
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.provenance import OUTSIDE
from lightning_qlora.survey.survey import Survey
from lightning_qlora.tensors.device_types import IN_16_BITS, held_type
from lightning_qlora.texts import groups

LARGEST = 5  # weights that stayed in 16 bits
UNEXPECTED_SHARE = 0.10  # of the weights that stayed in 16 bits before they are named

HOOKS = (
    "hooks of its weight are lost: register them on lora_A and lora_B after conversion (on_fit_start), or "
    f"{TRAIN_IN_FULL}"
)
COPY = (
    "one of them stays dense, so an average or a target that follows by zip(parameters()) meets other parameters: make "
    "the copy in on_fit_start, or after convert, or name the other one in modules_to_save; a copy that does not follow "
    "may stay"
)
IN_16 = (
    "trains in 16 bits, in which most steps of an optimizer are lost, because it is of a sharded module or a "
    "ScriptModule: build it in fp32"
)
CONVERTED_BEFORE = (
    "was converted before, with {}, and stays so: to convert with other arguments, build the module again, or merge "
    "the adapters first"
)
READ_DENSE = (
    "read in 16 bits and quantized afterwards, because target_modules matches its name only with the attribute that "
    "holds the model: to quantize it while the model loads, name it as in the model"
)
LARGE = (
    "trains in full, and new parts have more parameters than all adapters: if it was loaded from weights, name its "
    "linear layers in target_modules, or freeze it before conversion"
)


def note_before_conversion(
    report: ConversionReport, seen: Survey, choice: Selection, config: QLoRAConfig, copies: Sequence[Copy]
) -> None:
    if not seen.was_converted:
        if seen.origins.is_pretrained is False and choice.convert:
            report.note(NOTHING_PRETRAINED)
        if not choice.convert:
            advice = ""
            if FROZEN in choice.skip.values():
                advice = "; target_modules converts frozen layers that it names"
            report.note(f"no layer is in 4 bits ({no_layer(config)}){advice}")
    late = [part.names.full for part in seen.parts if part.is_read_dense]
    convert = choice.convert
    report.note(READ_DENSE, [name for name in late if name in convert])
    for name, row in choice.rows.items():
        if row.action == IN_VAIN:
            report.note(f"target_modules names it, and it stays dense and frozen: {row.reason}", [name])
    weights = {name: row.owner._parameters.get(row.key) for name, row in convert.items()}
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks")
    report.note(HOOKS, [name for name, weight in weights.items() if any(getattr(weight, key, None) for key in hooks)])
    originals = defaultdict[str, dict[str, None]](dict)
    arguments = {row.weight_name: row.config for row in convert.values()} if copies else {}
    for copy in copies:
        if copy.name in arguments and arguments[copy.name] == arguments.get(copy.original):
            continue  # both have the same adapters and 4-bit weights, so an average is right
        name, original = copy.modules
        originals[name][original] = None
    for name, of_copy in originals.items():
        report.note(f"copy of {groups(of_copy)}: {COPY}", [name])


def note_after_conversion(
    report: ConversionReport, parts: Parts, choice: Selection, device: torch.device | None
) -> None:
    parameters = dict(tensors_of(parts.named, ["_parameters"]))
    _note_what_stayed(report, parts, choice)
    report.note(IN_16, [name for name, p in parameters.items() if p.requires_grad and p.dtype in IN_16_BITS])
    new = {name: reason for name, reason in choice.train.items() if reason.startswith(OUTSIDE)}
    if new:
        in_new = (p.numel() for name, p in parameters.items() if not new.keys().isdisjoint(outer_names(name)))
        if sum(in_new) > report.adapter_parameters:
            report.note(LARGE, new)
    if not parts.layers:
        return
    layer, *others = parts.layers.values()
    if any(other.config is not layer.config for other in others):
        try:
            check_one_folder({name: layer.config for name, layer in parts.layers.items()})
        except ValueError as error:
            report.note(f"save_adapter will refuse it: {error}")
    if layer.config.compute_dtype == "bf16":
        held = held_type(device or layer.packed.device, torch.bfloat16)
        if held is not None:
            report.note(
                f"compute_dtype='bf16': {held.reason}. With compute_dtype='auto' the module is kept in fp32 here, and "
                "computes in it; files and merged weights have the same types"
            )


def note_other_arguments(report: ConversionReport, parts: Parts, config: QLoRAConfig) -> None:
    if config.rank_pattern or config.alpha_pattern:
        return
    for name, layer in parts.layers.items():
        other = differing_arguments(layer.config, config, arguments_that("of_layer"))
        if other:
            report.note(CONVERTED_BEFORE.format(", ".join(other)), [name])


def _note_what_stayed(report: ConversionReport, parts: Parts, choice: Selection) -> None:
    sizes = {}
    skipped = choice.skip
    for name, layer in parts.named:
        if isinstance(layer, (nn.Embedding, PackedLayer)):
            continue
        if is_linear(layer) and "weight" in layer._parameters:  # weight_norm stores others
            continue
        for key, parameter in layer._parameters.items():
            key = join(name, key)
            if parameter is None or parameter.ndim < 2 or parameter.requires_grad:
                continue
            if key not in skipped:
                sizes[key] = parameter.numel()
    share = sum(sizes.values()) / report.total_parameters
    if share > UNEXPECTED_SHARE:
        report.note(
            f"not linear, so it is frozen and not in 4 bits, as {100 * share:.0f}% of the weights: {TRAIN_IN_FULL}",
            sorted(sizes, key=lambda name: -sizes[name])[:LARGEST],
        )
