"""What a module must be before it is converted, and what users are warned of."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_qlora.adapters.base_compatibility import check_one_folder
from lightning_qlora.checks import first_of
from lightning_qlora.config import QLoRAConfig, arguments_that
from lightning_qlora.layers.copies import Copy
from lightning_qlora.layers.held_types import IN_16_BITS, reason_for_fp32
from lightning_qlora.layers.kinds import is_linear
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import inside, join, last_part, outer_names, owner_name, tensors_of
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.layers.provenance import OUTSIDE
from lightning_qlora.layers.qlora_linear import adapted_layers_of
from lightning_qlora.layers.selection import FROZEN, IN_MODULES_TO_SAVE, LARGE_RANK, WARN, Selection
from lightning_qlora.layers.selection_checks import hand_written_adapters
from lightning_qlora.layers.survey import QUANTIZED_KINDS, Survey
from lightning_qlora.training.report import ROOT, ConversionReport

LOAD_IT = "Load it, as all others, before the module reaches the Trainer or fabric.setup."
LOAD_IN_CONFIGURE_MODEL = (
    "Call lightning_qlora.load_weights(module, FOLDER) after fully_shard. A copy of a model that was loaded in "
    "configure_model has no values: load it by from_pretrained too, or load both in __init__."
)
COMPUTE_IT = (
    "It is in no state dict: its module computes it when it is built. Build the model within "
    "accelerate.init_empty_weights() in place of torch.device('meta'), or a transformers model by "
    "from_pretrained(None, config=..., state_dict=...)."
)
SHOWN = 5  # layers with the reason that each was skipped
UNEXPECTED_SHARE = 0.10  # of the weights left in 16 bit before a warning


def check_initialized(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse a module with a lazy layer that has not run yet: it has no parameters to quantize, freeze or train."""
    modules = list(modules)
    for name, tensor in tensors_of(modules):
        if is_lazy(tensor):
            owner = type(dict(modules)[owner_name(name)]).__name__
            raise ValueError(
                f"{name}: belongs to a {owner} that has not run yet, so it has no shape and can be neither quantized "
                "nor frozen. Run one batch through the module first (in __init__ or configure_model of a "
                "LightningModule), or build the layer with its input size."
            )


def check_has_data(modules: Iterable[tuple[str, nn.Module]], later: bool = False, advice: str = LOAD_IT) -> None:
    """Refuse a module that was built on the meta device if a part of it was never loaded, or can't be `later`."""
    owners = dict(modules)
    for name, tensor in tensors_of(list(owners.items())):
        if not tensor.is_meta:
            continue
        is_computed = last_part(name) in owners[owner_name(name)]._non_persistent_buffers_set
        if is_computed:
            advice = COMPUTE_IT
        elif later:
            continue
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        raise ValueError(f"{name}: this {kind} is on the meta device, so it has no data. {advice}")


def check_before_conversion(seen: Survey, choice: Selection, config: QLoRAConfig, first: bool) -> None:
    """Refuse layers, or warn of them, before they are converted; `first`: no earlier conversion made layers."""
    if first:
        _warn_of_hand_written_adapters(seen)
        _check_any(choice, config)
    _check_loaded(seen, choice)
    _warn_of_names_in_vain(choice)
    _warn_of_hooks(choice)


def warn_of_copies(copies: Iterable[Copy]) -> None:
    """Warn of weights that the module copied before it was converted: averages of them do not get the adapters."""
    pairs = dict.fromkeys(copy.modules for copy in copies)
    if pairs:
        names = first_of([f"{name or ROOT} of {original or ROOT}" for name, original in pairs], 3)
        rank_zero_warn(
            f"The module holds copies of layers that are converted: {names}. An average of weights (EMA, SWA, a "
            "teacher) that is made before conversion gets wrong values, because the adapters are not in it or are "
            "averaged apart from their weights' copies. Make it in on_fit_start, from the module that has its adapters "
            "then; in a loop of your own after convert. A copy that does not follow the module may stay, and "
            "disable_adapter is such a reference without a copy.",
            stacklevel=2,
        )


def warn_after_conversion(
    modules: Mapping[str, nn.Module], choice: Selection, config: QLoRAConfig, report: ConversionReport, first: bool
) -> None:
    """Warn of what a user may not expect of a converted module, whose modules by name are given."""
    parameters = dict(tensors_of(list(modules.items()), ["_parameters"]))
    _warn_of_what_stayed(modules, choice, report.total_parameters)
    _warn_of_16_bits(parameters)
    layers = adapted_layers_of(modules.items())
    if not first and choice.convert:
        _warn_of_two_configs(layers)
    elif not first and not config.rank_pattern and not config.alpha_pattern:
        for name, layer in layers.items():
            if warn_of_other_arguments(name, layer.config, config, arguments_that("of_layer")):
                break
    _warn_of_large_new_parts(parameters, choice, report)


def warn_of_slow_products(modules: Mapping[str, nn.Module], device: torch.device | None) -> None:
    """Warn if compute_dtype asks for a type in which the device of a module is slow."""
    layer = next((part for part in modules.values() if isinstance(part, LoRALayer)), None)
    if layer is None or layer.config.compute_dtype != "bf16":
        return
    reason = reason_for_fp32(device or layer.packed.device, torch.bfloat16)
    if reason is not None:
        rank_zero_warn(
            f"compute_dtype='bf16': {reason}. With compute_dtype='auto' the module is kept in fp32 here, and "
            "computes in it; files and merged weights have the same types.",
            stacklevel=2,
        )


def warn_of_other_arguments(name: str, previous: QLoRAConfig, config: QLoRAConfig, names: Iterable[str]) -> bool:
    """Warn of arguments that differ from those of an earlier conversion, which is not done again; whether some do."""
    other = _differing(previous, config, names)
    if other:
        warnings.warn(
            f"{name}: was converted before, with {', '.join(other)}, and stays so. To convert with other arguments, "
            "build the module again, or merge the adapters first (lightning_qlora.merge).",
            stacklevel=2,
        )
    return bool(other)


def _differing(previous: QLoRAConfig, config: QLoRAConfig, names: Iterable[str]) -> list[str]:
    pairs = ((name, getattr(previous, name), getattr(config, name)) for name in names)
    return [f"{name}={was!r} and not {new!r}" for name, was, new in pairs if was != new]


def _check_loaded(seen: Survey, choice: Selection) -> None:
    dense = choice.skip | choice.train
    for part in seen.parts:
        if part.kind not in QUANTIZED_KINDS:
            continue
        name = part.names.full
        row = choice.rows.get(name)
        if row is None or row.config is None:
            differing = [f"is to stay dense now: {dense.get(name, IN_MODULES_TO_SAVE)}"]
        else:
            layer: Any = part.owner if part.stack is None else part.stack.loaded
            differing = _differing(layer.config, row.config, arguments_that("at_loading"))
        if differing:
            raise ValueError(
                f"{name}: was quantized while its model loaded ({', '.join(differing)}). Load and convert with the "
                "same arguments (exclude_modules keeps layers dense from the start), or load the model outside of "
                "configure_model and plugin.init()."
            )


def _warn_of_hand_written_adapters(seen: Survey) -> None:
    by_hand = hand_written_adapters(seen)
    if by_hand:
        rank_zero_warn(
            f"{len(by_hand)} frozen linear layers have adapters that were written by hand, two low-rank matrices "
            f"beside them: {first_of(by_hand, 3)}. Conversion adds its own. "
            "Leave out those of the module, and name the layers in target_modules if they stay frozen; or keep those: "
            "name the layers in exclude_modules, and the modules with the matrices in modules_to_save.",
            stacklevel=2,
        )


def _check_any(choice: Selection, config: QLoRAConfig) -> None:
    """Warn if no layer is to be converted; raise ValueError if nothing trains then, or all because of r."""
    if choice.convert:
        return
    message = f"No layer was converted to 4 bits (target_modules={config.target_modules!r}, r={config.r})."
    if not choice.train:
        reasons = "".join(f"\n  {name or ROOT}: {why}" for name, why in list(choice.skip.items())[:SHOWN])
        if len(choice.skip) > SHOWN:
            reasons += f"\n  and {len(choice.skip) - SHOWN} more"
        raise ValueError(message + (reasons or " The module has no linear layer (nn.Linear, Conv1D)."))
    small = [name for name, reason in choice.train.items() if reason.startswith(LARGE_RANK)]
    if small:
        raise ValueError(
            f"{message} Adapters of this rank would not be smaller than the weights of the layers, so {len(small)} "
            f"would train in full: {first_of(small, 3)}. Set a smaller r, or name in modules_to_save what is to train "
            "in full."
        )
    message += " The report has the reason for each."
    if FROZEN in choice.skip.values():
        message += " target_modules converts frozen layers that it names."
    warnings.warn(message, stacklevel=2)


def _warn_of_names_in_vain(choice: Selection) -> None:
    in_vain = choice.reasons(WARN)
    if in_vain:
        reasons = "; ".join(f"{name}: {why}" for name, why in in_vain.items())
        rank_zero_warn(f"target_modules names layers that stay dense and frozen. {reasons}.", stacklevel=2)


def _warn_of_hooks(choice: Selection) -> None:
    hooked = []
    for name, row in choice.convert.items():
        weight = row.owner._parameters.get(row.key)
        if getattr(weight, "_backward_hooks", None) or getattr(weight, "_post_accumulate_grad_hooks", None):
            hooked.append(name)
    if hooked:
        warnings.warn(
            f"The hooks of {len(hooked)} weights ({first_of(hooked, 3)}) are "
            "lost, because 4-bit weights get no gradient. Register hooks of lora_A and lora_B after conversion "
            "(on_fit_start), or name a layer in modules_to_save to train its weight.",
            stacklevel=2,
        )


def _warn_of_16_bits(parameters: Mapping[str, Tensor]) -> None:
    trained = ((name, p) for name, p in parameters.items() if p.requires_grad)
    sizes = {name: p.numel() for name, p in trained if p.dtype in IN_16_BITS}
    if sizes:
        rank_zero_warn(
            f"{first_of(sizes, 5)}: {sum(sizes.values()):,} elements train in 16 bits, in which most steps of an "
            "optimizer are lost. They can't be kept in fp32: they are of a sharded module or of a ScriptModule. Build "
            "them in fp32.",
            stacklevel=2,
        )


def _warn_of_two_configs(layers: Mapping[str, LoRALayer]) -> None:
    try:
        check_one_folder({name: layer.config for name, layer in layers.items()})
    except ValueError as error:
        warnings.warn(f"save_adapter will refuse this module: {error}", stacklevel=2)


def _warn_of_large_new_parts(parameters: Mapping[str, Tensor], choice: Selection, report: ConversionReport) -> None:
    new = {name: reason for name, reason in choice.train.items() if reason.startswith(OUTSIDE)}
    sizes = Counter[str]()  # by the first part of the name
    for name, parameter in parameters.items() if new else ():
        if not new.keys().isdisjoint(outer_names(name)):
            sizes[name.partition(".")[0]] += parameter.numel()
    if sizes.total() <= report.adapter_parameters:
        return
    largest, size = sizes.most_common(1)[0]
    reason = next(reason for name, reason in new.items() if inside(name, largest)).removeprefix("new: ")
    rank_zero_warn(
        f"{largest!r} trains in full ({size:,} parameters; adapters have {report.adapter_parameters:,}), because it is "
        f"{reason}. If it was loaded from weights, name its linear layers in target_modules too, or freeze it before "
        "conversion (requires_grad_(False)).",
        stacklevel=2,
    )


def _warn_of_what_stayed(modules: Mapping[str, nn.Module], choice: Selection, total: int) -> None:
    sizes = {}
    skipped = choice.skip
    for name, layer in modules.items():
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
    share = sum(sizes.values()) / total
    if share > UNEXPECTED_SHARE:
        largest = sorted(sizes, key=lambda name: -sizes[name])
        warnings.warn(
            f"{100 * share:.0f}% of the weights are frozen and not in 4 bits, because they belong "
            f"to layers that are not linear: {first_of(largest, 5)}. Name a module "
            "in modules_to_save to train it.",
            stacklevel=2,
        )
