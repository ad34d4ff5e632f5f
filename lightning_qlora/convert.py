"""Convert a module in place: choose its linear layers, quantize them one by one, freeze the rest, report."""

import itertools
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from tqdm import tqdm

from lightning_qlora import seams
from lightning_qlora.adapters.base_model import forget_quantizer
from lightning_qlora.adapters.folder import read_adapter
from lightning_qlora.adapters.module import config_of_adapter, put_adapter
from lightning_qlora.bnb_layers import decode_bnb_layer, is_bnb_linear, take_bnb_weight
from lightning_qlora.calibration import Calibration, calibration_of
from lightning_qlora.checkpointing import enable_checkpointing
from lightning_qlora.choose import Choice, choose_layers, inside
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.linear import REPLACED, QLoRALinear, adapted_layers
from lightning_qlora.loaded import make_dense, settle
from lightning_qlora.report import ConversionReport, count_parameters, dense_bytes
from lightning_qlora.sharded import is_sharded
from lightning_qlora.state import remember_base

LOAD_IT = "Load it, as all others, before the module reaches the Trainer or fabric.setup."
COMPUTE_IT = (
    "No state dict holds it: its module computes it when it is built. Build the model within "
    "accelerate.init_empty_weights() in place of torch.device('meta'), or a transformers model by "
    "from_pretrained(None, config=..., state_dict=...)."
)
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


def convert_module(module: nn.Module, config: QLoRAConfig, device: torch.device | None = None) -> ConversionReport:
    """`convert` with a ready config; `device`: where to quantize (None: where each weight is)."""
    check_initialized(module)
    start, bytes_before = time.perf_counter(), dense_bytes(module)
    if is_converted(module):
        _warn_of_the_rest(module, config)
        return _report(module, Choice(), bytes_before, start)
    _check_has_data(module)
    adapter = read_adapter(config.adapter) if config.adapter else None
    if adapter is not None:
        config = config_of_adapter(module, adapter, config)
    choice = choose_layers(module, config)
    _check_any(choice, config)
    layers = choice.convert.items()
    for name, layer in tqdm(layers, "Quantizing", leave=False, delay=2, unit=" layers", disable=not _is_rank_zero()):
        _convert_layer(name, layer, config, device)
    for name, layer in module.named_modules():  # not among those to convert
        if is_bnb_linear(layer):
            decode_bnb_layer(layer)
        elif isinstance(layer, QLoRALinear) and layer.loaded is not None:
            with _named(name, layer):
                make_dense(layer)
    forget_quantizer(module)
    freeze(module, choice)
    if adapter is not None:
        put_adapter(module, adapter)
    if config.gradient_checkpointing:
        enable_checkpointing(module)
    seams.keep_encoder_layers_on_the_module_path(module)
    remember_base(module, config)
    _warn_of_what_stayed(module)
    if config.start == "calibrated" and choice.convert:
        Calibration(module, config)
    return _report(module, choice, bytes_before, start)


def is_converted(module: nn.Module) -> bool:
    """Whether a module, or the part of it with the adapters, went through `convert_module`."""
    return bool(adapted_layers(module)) and any("_qlora_frozen" in vars(part) for part in module.modules())


def _warn_of_the_rest(module: nn.Module, config: QLoRAConfig) -> None:
    """Name the linear layers beside a part that was converted by itself: nothing of them is in 4 bits or frozen."""
    parts = [name for name, part in module.named_modules() if "_qlora_frozen" in vars(part)]
    choice = choose_layers(module, config, part_of_module=True)
    rest = [name for name in choice.convert if not any(inside(name, part) for part in parts)]
    if rest:
        warnings.warn(
            f"{', '.join(parts)}: converted before, so the rest of the module is left as it is, and its linear layers "
            f"({', '.join(rest[:5])}{', ...' if len(rest) > 5 else ''}) are neither in 4 bits nor frozen. To convert "
            f"all of it, let the whole module be converted at once; if this is meant, exclude_modules={rest[:1]} says "
            "so.",
            stacklevel=2,
        )


def check_initialized(module: nn.Module) -> None:
    """Refuse a module with a lazy layer that has not run yet: what it will hold could not be frozen, or trained."""
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(
                f"{name}: belongs to a {owner} that has not run yet, so it has no shape and can be neither quantized "
                "nor frozen. Run one batch through the module first (in __init__ or configure_model of a "
                "LightningModule), or build the layer with its input size."
            )


def _check_has_data(module: nn.Module) -> None:
    """Refuse a module that was built on the meta device and of which a part was never loaded."""
    tensors: list[tuple[str, str, Tensor]] = [("parameter", *named) for named in module.named_parameters()]
    tensors += [("buffer", *named) for named in module.named_buffers()]
    for kind, name, tensor in tensors:
        if tensor.is_meta:
            owner, _, key = name.rpartition(".")
            computed = key in module.get_submodule(owner)._non_persistent_buffers_set
            raise ValueError(
                f"{name}: this {kind} is on the meta device, so there is no data. {COMPUTE_IT if computed else LOAD_IT}"
            )


def has_meta(module: nn.Module) -> bool:
    """Whether a parameter or buffer is on the meta device."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def _is_rank_zero() -> bool:
    return not getattr(rank_zero_only, "rank", 0)


def _convert_layer(name: str, layer: nn.Module, config: QLoRAConfig, device: torch.device | None) -> None:
    if isinstance(layer, QLoRALinear):
        with _named(name, layer):
            settle(layer, config, name, device)
        return
    weight = layer._parameters["weight"]
    where = name or type(layer).__name__
    if is_sharded(weight):
        raise ValueError(
            f"{where}: its weight is sharded already (a DTensor), and a shard can't be quantized. Convert before "
            "fully_shard or parallelize_module: call lightning_qlora.convert(model) first. The plugin does so itself "
            "where configure_model calls fully_shard on a part of self (self.model = model comes first)."
        )
    with _named(name, layer):
        if is_bnb_linear(layer):
            setattr(weight, REPLACED, name)  # for an optimizer that was made too early
            QLoRALinear.from_packed(layer, *take_bnb_weight(layer), config, name)
        else:
            QLoRALinear.from_linear(layer, config, name, device)


@contextmanager
def _named(name: str, layer: nn.Module) -> Iterator[None]:
    """Errors within this name the layer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name or type(layer).__name__}: {error}") from error


def freeze(module: nn.Module, choice: Choice) -> None:
    """Let adapters, and what was chosen to train in full, train; nothing else."""
    trained = {id(p) for name in choice.train for p in module.get_submodule(name).parameters()}
    adapters = {id(p) for layer in adapted_layers(module).values() for p in layer.adapter_parameters()}
    for parameter in module.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(id(parameter) in adapters | trained)


def _check_any(choice: Choice, config: QLoRAConfig) -> None:
    if choice.convert:
        return
    left = "\n".join(
        f"  {name or '(the module itself)'}: {why}" for name, why in [*choice.train.items(), *choice.skip.items()]
    )
    message = f"No layer was converted to 4 bits (target_modules={config.target_modules!r}, r={config.r}).\n{left}"
    if not choice.train:
        raise ValueError(message.rstrip() + ("" if left else "  The module has no linear layer (nn.Linear, Conv1D)."))
    warnings.warn(message + "\nA smaller r converts more layers.", stacklevel=2)


def _warn_of_what_stayed(module: nn.Module) -> None:
    """Name the matrices that nobody asked to keep and that are not linear layers, where they weigh much."""
    _, total, _ = count_parameters(module)
    kept = {
        f"{name}.{key}".lstrip("."): parameter.numel()
        for name, layer in module.named_modules()
        if not isinstance(layer, (nn.Linear, nn.Embedding)) and type(layer).__name__ != "Conv1D"
        for key, parameter in layer._parameters.items()
        if parameter is not None and parameter.ndim >= 2 and not parameter.requires_grad
    }
    if sum(kept.values()) > UNEXPECTED_SHARE * total:
        largest = sorted(kept, key=lambda name: -kept[name])[:5]
        warnings.warn(
            f"{100 * sum(kept.values()) / total:.0f}% of the weights stay as they came, frozen, because they belong "
            f"to layers that are not linear: {', '.join(largest)}{', ...' if len(kept) > 5 else ''}. Name a module "
            "in modules_to_save to train it.",
            stacklevel=2,
        )


def _report(module: nn.Module, choice: Choice, bytes_before: int, start: float) -> ConversionReport:
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
        calibration=None if calibration is None else calibration.report,
    )
