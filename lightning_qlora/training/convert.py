"""Convert a module in place: choose linear layers, quantize them one after another, freeze the rest, report."""

import itertools
import time
import warnings
from dataclasses import asdict
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.adapters.save_load import config_of_adapter, set_adapter_of_module
from lightning_qlora.adapters.state_dict import use_adapter_state_dict
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.huggingface.patches import (
    forget_quantizer,
    refuse_peft_on_4_bit_layers,
    refuse_save_pretrained,
)
from lightning_qlora.layers.bnb_linear import decode_bnb_layer, is_bnb_linear, pop_bnb_weight
from lightning_qlora.layers.deferred_head import check_output_embeddings, defer_output_embeddings, deferred_heads
from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.experts import QLoRAExperts, expert_stacks
from lightning_qlora.layers.names import inside, named
from lightning_qlora.layers.patches import explain_requires_grad
from lightning_qlora.layers.qlora_linear import REPLACED, QLoRALinear, adapted_layers
from lightning_qlora.layers.readable_stack import SUFFIX
from lightning_qlora.layers.selection import (
    Selection,
    StackToConvert,
    ToConvert,
    check_names_in_loaded_models,
    select_in_part,
    select_layers,
)
from lightning_qlora.training.calibration.calibration import Calibration, calibration_of
from lightning_qlora.training.gradient_checkpointing import enable_gradient_checkpointing
from lightning_qlora.training.patches import count_weights_in_transformers
from lightning_qlora.training.report import ROOT, ConversionReport, count_parameters, dense_bytes

LOAD_IT = "Load it, as all others, before the module reaches the Trainer or fabric.setup."
COMPUTE_IT = (
    "It is in no state dict: its module computes it when it is built. Build the model within "
    "accelerate.init_empty_weights() in place of torch.device('meta'), or a transformers model by "
    "from_pretrained(None, config=..., state_dict=...)."
)
AT_LOADING = (  # arguments that a layer which was quantized while its model loaded has used already
    "quant_type", "block_size", "double_quant", "r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights",
    "loftq_config",
)  # fmt: skip
ARGUMENTS = ("_qlora_config", "_qlora_arguments")  # attributes of a converted module: in checkpoints, and as given
UNEXPECTED_SHARE = 0.10  # of the weights left in 16 bit before a warning


def convert(module: nn.Module, **arguments: Any) -> ConversionReport:
    """Turn a module's linear layers into frozen 4-bit layers with LoRA adapters, in place.

    Args:
        module: Any module, its weights loaded; a second conversion of the same module changes nothing.
        **arguments: Those of `QLoRAPrecision` (see `QLoRAConfig`).

    Returns:
        What was converted, what was not and why, parameters and bytes before and after.

    Raises:
        TypeError, ValueError: If an argument is wrong, no layer can be converted, or a weight can't be quantized.
    """
    return convert_module(module, QLoRAConfig(**arguments))


def convert_module(
    module: nn.Module, config: QLoRAConfig, device: torch.device | None = None, sharded: bool = False
) -> ConversionReport:
    """`convert` with a config.

    Args:
        module: As in `convert`.
        config: The arguments.
        device: Where to quantize; None: where each weight is.
        sharded: Whether a strategy shards the module afterwards. Its logits are not deferred.
    """
    check_initialized(module)
    start, bytes_before = time.perf_counter(), dense_bytes(module)
    if is_converted(module):
        _warn_of_other_arguments(module, config)
        _warn_of_the_rest(module, config)
        return conversion_report(module, Selection(), bytes_before, start, deferred_heads(module))
    _check_has_data(module)
    given = config
    adapter = read_adapter(config.adapter) if config.adapter else None
    if adapter is not None:
        config = config_of_adapter(module, adapter, config)
    check_output_embeddings(module, config.deferred_logits)
    choice = select_layers(module, config)
    if adapter is None:
        check_names_in_loaded_models(module, config, choice)
    check_any(choice, config)
    _check_loaded(module, choice)
    layers: list[tuple[str, ToConvert | StackToConvert]] = [*choice.convert.items(), *choice.stacks.items()]
    silent = True if getattr(rank_zero_only, "rank", 0) else None  # None: also where stderr is no terminal
    for name, layer in tqdm(layers, "Quantizing", leave=False, delay=2, unit=" layers", disable=silent):
        with named(name or type(layer.layer).__name__ if isinstance(layer, ToConvert) else name):
            (_convert_layer if isinstance(layer, ToConvert) else _convert_stack)(name, layer, device)
    for layer in module.modules():
        if is_bnb_linear(layer):
            decode_bnb_layer(layer)
    forget_quantizer(module)
    freeze(module, choice)
    if adapter is not None:
        set_adapter_of_module(module, adapter)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(module)
    deferred = defer_output_embeddings(module, config.deferred_logits, sharded)
    count_weights_in_transformers()
    explain_requires_grad()
    use_adapter_state_dict(module, config)
    module._qlora_arguments = given  # type: ignore[assignment]
    refuse_save_pretrained()
    refuse_peft_on_4_bit_layers()
    warn_of_what_stayed(module, choice)
    if config.start == "calibrated" and layers:
        Calibration(module, config)
    return conversion_report(module, choice, bytes_before, start, deferred)


def is_converted(module: nn.Module) -> bool:
    """Whether a module, or the part of it with the adapters, went through `convert_module`."""
    return bool(adapted_layers(module)) and any("_qlora_frozen" in vars(part) for part in module.modules())


def _warn_of_other_arguments(module: nn.Module, config: QLoRAConfig) -> None:
    """Warn of arguments that differ from those of the first conversion, which is not done again.

    Names of layers in other parts may be new for a part of the module.
    """
    for name, part in module.named_modules():
        # An adapter that was loaded changes the arguments in checkpoints; both are known, then.
        known = [value for key in ARGUMENTS if isinstance(value := vars(part).get(key), QLoRAConfig)]
        if not known or config in known:
            continue
        pairs = [(field, getattr(known[-1], field), getattr(config, field)) for field in asdict(config)]
        no_matter = {"paged_optimizer"} | ({"target_modules", "exclude_modules", "modules_to_save"} if name else set())
        other = [f"{a}={was!r} and not {new!r}" for a, was, new in pairs if was != new and a not in no_matter]
        if other:
            warnings.warn(
                f"{name or type(part).__name__}: was converted before, with {', '.join(other)}, and stays so. To "
                "convert with other arguments, build the module again.",
                stacklevel=2,
            )


def _warn_of_the_rest(module: nn.Module, config: QLoRAConfig) -> None:
    """Warn of linear layers beside a part that was converted before: they are neither in 4 bits nor frozen."""
    parts = [name for name, part in module.named_modules() if "_qlora_frozen" in vars(part)]
    choice = select_in_part(module, config)
    rest = [name for name in [*choice.convert, *choice.stacks] if not any(inside(name, part) for part in parts)]
    if rest:
        warnings.warn(
            f"{', '.join(parts)}: converted before, so nothing else is converted now: other linear layers "
            f"({', '.join(rest[:5])}{', ...' if len(rest) > 5 else ''}) are neither in 4 bits nor frozen. Convert the "
            f"whole module at once, or name them in exclude_modules ({rest[:1]}, ...).",
            stacklevel=2,
        )


def check_initialized(module: nn.Module) -> None:
    """Refuse a module with a lazy layer that has not run yet: it has no parameters to quantize, freeze or train."""
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(
                f"{name}: belongs to a {owner} that has not run yet, so it has no shape and can be neither quantized "
                "nor frozen. Run one batch through the module first (in __init__ or configure_model of a "
                "LightningModule), or build the layer with its input size."
            )


def _check_has_data(module: nn.Module) -> None:
    """Refuse a module that was built on the meta device if a part of it was never loaded."""
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
            owner, _, key = name.rpartition(".")
            what = COMPUTE_IT if key in module.get_submodule(owner)._non_persistent_buffers_set else LOAD_IT
            raise ValueError(f"{name}: this {kind} is on the meta device, so it has no data. {what}")


def has_meta(module: nn.Module) -> bool:
    """Whether a parameter or buffer is on the meta device."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def _check_loaded(module: nn.Module, choice: Selection) -> None:
    """Refuse other arguments than those that layers were quantized with while their model loaded."""
    parameter_of = {
        f"{name}{SUFFIX}.{number}": name for name, _, _, stack in expert_stacks(module) for number in range(len(stack))
    }
    for name, layer in module.named_modules():
        if not isinstance(layer, QLoRALinear) or not layer.loaded:
            continue
        name = parameter_of.get(name, name)
        chosen = choice.convert.get(name) or choice.stacks.get(name)
        if chosen is None:
            why = choice.skip.get(name) or choice.train.get(name) or "in modules_to_save"
            differing = f"is to stay dense now ({why})"
        else:
            pairs = ((w, getattr(layer.config, w), getattr(chosen.config, w)) for w in AT_LOADING)
            differing = ", ".join(f"{word}={was!r} became {now!r}" for word, was, now in pairs if was != now)
        if differing:
            raise ValueError(
                f"{name}: was quantized while its model loaded, and {differing}. Load and convert with the same "
                "arguments, or load the model outside of configure_model and plugin.init()."
            )


def _convert_layer(name: str, to_convert: ToConvert, device: torch.device | None) -> None:
    layer, config, seed_name = to_convert
    if isinstance(layer, QLoRALinear):
        _adopt_loaded(layer, config, name)
        return
    _check_not_sharded(layer._parameters["weight"])
    if is_bnb_linear(layer):
        setattr(layer._parameters["weight"], REPLACED, name)  # for an optimizer that was made too early
        QLoRALinear.from_packed(layer, *pop_bnb_weight(layer), config, name, seed_name)
    else:
        QLoRALinear.from_linear(layer, config, name, device, seed_name)


def _convert_stack(name: str, to_convert: StackToConvert, device: torch.device | None) -> None:
    (owner, key, experts, transposed), config, seed_name = to_convert
    if (loaded := to_convert.parameter.loaded) is not None:
        for number, layer in enumerate(loaded.layers):
            _adopt_loaded(layer, config, f"{name}{SUFFIX}.{number}")
        return
    _check_not_sharded(owner._parameters[key])
    QLoRAExperts.from_parameter(owner, key, config, name, experts, transposed, device, seed_name)


def _adopt_loaded(layer: QLoRALinear, config: QLoRAConfig, name: str) -> None:
    """Complete a layer that was quantized while its model loaded: what else it has is decided by now."""
    layer.config, layer.full_name, layer.loaded = config, name, False
    layer.lora_dropout = config.lora_dropout


def _check_not_sharded(weight: Any) -> None:
    if is_sharded(weight):
        raise ValueError(
            "its weight is sharded already (a DTensor), and a shard can't be quantized. Call "
            "lightning_qlora.convert(model) before fully_shard or parallelize_module. The plugin does so if "
            "configure_model sets self.model = model before it calls fully_shard."
        )


def freeze(module: nn.Module, choice: Selection) -> None:
    """Let only the adapters, and the modules that were chosen to train in full, train."""
    trained = {id(p) for name in choice.train for p in module.get_submodule(name).parameters()}
    adapters = {id(p) for layer in adapted_layers(module).values() for p in layer.adapter_parameters()}
    for parameter in module.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(id(parameter) in adapters | trained)


def check_any(choice: Selection, config: QLoRAConfig) -> None:
    """Warn if no layer is to be converted; raise ValueError if nothing trains then."""
    if choice.convert or choice.stacks:
        return
    left = "\n".join(f"  {name or ROOT}: {why}" for name, why in [*choice.train.items(), *choice.skip.items()])
    message = f"No layer was converted to 4 bits (target_modules={config.target_modules!r}, r={config.r}).\n{left}"
    if not choice.train:
        raise ValueError(message.rstrip() + ("" if left else "  The module has no linear layer (nn.Linear, Conv1D)."))
    warnings.warn(message + "\nA smaller r converts more layers.", stacklevel=2)


def warn_of_what_stayed(module: nn.Module, choice: Selection) -> None:
    """Warn of frozen matrices that belong to no linear layer or embedding, if they are a large part of the weights."""
    _, total, _ = count_parameters(module)
    kept = {
        full: parameter.numel()
        for name, layer in module.named_modules()
        if not isinstance(layer, (nn.Linear, nn.Embedding)) and type(layer).__name__ != "Conv1D"
        for key, parameter in layer._parameters.items()
        if parameter is not None and parameter.ndim >= 2 and not parameter.requires_grad
        if (full := f"{name}.{key}".lstrip(".")) not in choice.skip
    }
    if sum(kept.values()) > UNEXPECTED_SHARE * total:
        largest = sorted(kept, key=lambda name: -kept[name])[:5]
        warnings.warn(
            f"{100 * sum(kept.values()) / total:.0f}% of the weights are frozen and not in 4 bits, because they belong "
            f"to layers that are not linear: {', '.join(largest)}{', ...' if len(kept) > 5 else ''}. Name a module "
            "in modules_to_save to train it.",
            stacklevel=2,
        )


def conversion_report(
    module: nn.Module, choice: Selection, bytes_before: int, start: float, deferred: dict[str, int]
) -> ConversionReport:
    """The report of a module that was converted; `start` is the time at which the conversion began."""
    trainable, total, bytes_after = count_parameters(module)
    layers = adapted_layers(module)
    calibration = calibration_of(module)
    return ConversionReport(
        converted=list(layers),
        trained_in_full=choice.train,
        skipped=choice.skip,
        trainable_parameters=trainable,
        total_parameters=total,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        seconds=time.perf_counter() - start,
        shapes={name: (layer.out_features, layer.in_features) for name, layer in layers.items()},
        deferred_logits=deferred,
        calibration=None if calibration is None else calibration.report,
    )
