"""What a user should look at after a conversion: rows of the report with a mark."""

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from lightning_qlora.checks import TRAIN_IN_FULL
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.conversion.convert_checks import no_layer
from lightning_qlora.conversion.report import NOTHING_PRETRAINED, ConversionReport
from lightning_qlora.dtypes.full_precision import autocast_type, trains_in_full
from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.names import join, outer_names, owner_name, tensors_of
from lightning_qlora.layers.packed_layer import PackedLayer
from lightning_qlora.selection.copies import Copy
from lightning_qlora.selection.selection import FROZEN, IN_VAIN, Selection
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.provenance import OUTSIDE
from lightning_qlora.survey.survey import Survey
from lightning_qlora.tensors.held_types import types_before
from lightning_qlora.texts import groups

LARGEST = 5  # weights that stayed in 16 bits
UNEXPECTED_SHARE = 0.10  # of the weights that stayed in 16 bits before they are named

COPY = (
    "one of them stays dense, so an average or a target that follows by zip(parameters()) meets other parameters: make "
    "the copy in on_fit_start, or after convert, or name the other one in modules_to_save; a copy that does not follow "
    "may stay"
)
HELD = (
    "holds weights of {} from before conversion. An average in it can't follow the adapters, nor is the adapter in "
    "what is computed with it: make it in on_fit_start, after fabric.setup, or after convert. Any other copy may stay"
)
CONVERTED_BEFORE = (
    "was converted before, with {}, and stays so: to convert with other arguments, build the module again, or merge "
    "the adapters first"
)
COMPUTES_IN_16_BITS = (
    "trains in fp32 and computes in {} under autocast, as the rest of the module; where it must compute in fp32, call "
    "it within torch.autocast(device_type, enabled=False)"
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
    convert = choice.convert
    for name, row in choice.rows.items():
        if row.action == IN_VAIN:
            report.note(f"target_modules names it, and it stays dense and frozen: {row.reason}", [name])
    originals = defaultdict[str, dict[str, None]](dict)
    held = defaultdict[str, dict[str, None]](dict)
    arguments = {row.weight_name: row.config for row in convert.values()} if copies else {}
    for copy in copies:
        if not copy.is_part:
            held[copy.name][owner_name(copy.original)] = None
            continue
        if copy.name in arguments and arguments[copy.name] == arguments.get(copy.original):
            continue  # both have the same adapters and 4-bit weights, so an average is right
        name, original = copy.modules
        originals[name][original] = None
    for name, of_copy in originals.items():
        report.note(f"copy of {groups(of_copy)}: {COPY}", [name])
    for name, of_attribute in held.items():
        report.note(HELD.format(groups(of_attribute)), [name])


def note_after_conversion(report: ConversionReport, parts: Parts, choice: Selection) -> None:
    parameters = dict(tensors_of(parts.named, ["_parameters"]))
    _note_what_stayed(report, parts, choice)
    dtype = autocast_type(parts.root) if parts.traits.has_16_bits else None
    of_fp32 = [name for name, part in parts.named if dtype and trains_in_full(part) and not types_before(part)]
    if of_fp32:
        report.note(COMPUTES_IN_16_BITS.format(str(dtype).removeprefix("torch.")), of_fp32)
    new = {name: reason for name, reason in choice.train.items() if reason.startswith(OUTSIDE)}
    if new:
        in_new = (p.numel() for name, p in parameters.items() if not new.keys().isdisjoint(outer_names(name)))
        if sum(in_new) > report.adapter_parameters:
            report.note(LARGE, new)


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
