"""Models whose tensors have no data, and their conversion."""

import copy
import os
import time
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_qlora.adapters.peft_reader import read_adapter
from lightning_qlora.adapters.save_load import config_of_adapter
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.files.regular_file import is_file
from lightning_qlora.layers.deferred_head import check_output_embeddings, defer_output_embeddings, deferred_heads
from lightning_qlora.layers.dotted_names import expert_name
from lightning_qlora.layers.experts import QLoRAExperts
from lightning_qlora.layers.kinds import kind_of
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.layers.records import unrecorded
from lightning_qlora.layers.selection import select_layers
from lightning_qlora.quantization.packed_weight import PackedWeight
from lightning_qlora.tools.patches import run_without_data
from lightning_qlora.training.convert import add_tokens, conversion_report, freeze
from lightning_qlora.training.convert_checks import check_any, warn_of_what_stayed
from lightning_qlora.training.gradient_checkpointing import enable_gradient_checkpointing
from lightning_qlora.training.report import ConversionReport, parameter_bytes


def fake_copy(module: nn.Module) -> nn.Module:
    """Copy a module; the parameters and buffers of the copy have no data."""
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(f"{name}: is a torch.jit.ScriptModule, which can't be copied without data. Leave it out.")
    tensors: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        tensors[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for part in module.modules():
        for value in (*part._buffers.values(), *vars(part).values()):
            if isinstance(value, Tensor):
                tensors[id(value)] = torch.empty(value.shape, dtype=value.dtype, device="cpu")
    return copy.deepcopy(module, tensors)


def meta_model(model: Any) -> nn.Module:
    """Build a transformers model on the meta device, from its config, folder or hub name."""
    try:
        import transformers
    except ImportError as error:
        raise TypeError(f"model={model!r}: is not a module, and transformers is not installed.") from error
    named = isinstance(model, (str, os.PathLike))
    if named:
        is_file(os.path.join(model, "config.json"))  # transformers would wait for a pipe
    elif not isinstance(model, transformers.PretrainedConfig):
        raise TypeError(
            f"model={type(model).__name__}: must be a module, a transformers config, a folder or a hub name."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(model) if named else model
        with torch.device("meta"):
            return _model_of_config(config)
    except OSError as error:
        raise FileNotFoundError(
            f"{model}: neither a folder with a config.json nor a model on the hub ({one_line(error)})."
        ) from error
    except Exception as error:  # any error of the model's own code
        where = f"{model}: its config.json" if named else f"model={type(model).__name__}: it"
        raise ValueError(
            f"{where} makes no model ({one_line(error)}). Correct it, or pass a module to estimate_memory."
        ) from error


def _model_of_config(config: Any) -> nn.Module:
    import transformers

    dtype = getattr(config, "dtype", None) or torch.bfloat16
    name = next(iter(getattr(config, "architectures", None) or []), "")
    causal_models: Any = transformers.AutoModelForCausalLM._model_mapping
    model_class: Any = getattr(transformers, name, None) or causal_models.get(type(config), None)
    make: Any = transformers.AutoModel.from_config if model_class is None else model_class._from_config
    return cast(nn.Module, make(config, dtype=dtype))


def convert_fake_model(fake_model: nn.Module, config: QLoRAConfig) -> tuple[list[QLoRALinear], ConversionReport]:
    """Convert a model without data as `convert_module` does one with data; returns its 4-bit layers and a report."""
    if config.adapter is not None:
        config = config_of_adapter(fake_model, read_adapter(config.adapter), config)
    check_output_embeddings(fake_model, config.deferred_logits)
    start, bytes_before = time.perf_counter(), parameter_bytes(fake_model)
    how = config.quant_type, config.block_size, config.double_quant
    choice, new = select_layers(fake_model, config), unrecorded(fake_model)
    check_any(choice, config)
    for name, (layer, of_layer, seed_name) in choice.convert.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        packed = PackedWeight.without_data(weight.T if kind_of(type(layer)).transposed else weight, *how)
        QLoRALinear.from_packed(layer, packed, type(layer), of_layer, name, seed_name)
    for name, (stack, of_stack, _) in choice.stacks.items():

        def convert(layer: nn.Linear, number: int, name: str = name, own: QLoRAConfig = of_stack) -> None:
            packed = PackedWeight.without_data(layer.weight, *how)
            QLoRALinear.from_packed(layer, packed, nn.Linear, own, expert_name(name, number))

        QLoRAExperts.from_slices(*stack, convert)
    freeze(fake_model, choice, new)
    add_tokens(fake_model, choice)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(fake_model)
    defer_output_embeddings(fake_model, config.deferred_logits)
    run_without_data(fake_model)
    warn_of_what_stayed(fake_model, choice)
    report = conversion_report(fake_model, choice, bytes_before, start, deferred_heads(fake_model))
    return list(adapted_layers(fake_model).values()), report


def one_line(error: Exception) -> str:
    """Type and message of an error, on one line and shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
