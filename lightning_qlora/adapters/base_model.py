"""The base model inside a LightningModule: what PEFT and vLLM would load, and so where the names of adapters begin."""

import re
import sys
from collections.abc import Iterator
from typing import Any

from lightning.fabric.wrappers import _FabricModule
from lightning.pytorch import LightningModule
from torch import nn

from lightning_qlora.adapters.kept_start import quantization_of_layer
from lightning_qlora.linear import QLoRAConv1D, QLoRALinear, adapted_layers

COMPILED = "_orig_mod"  # the name torch.compile gives a module inside its wrapper
TASKS = {  # class name ending -> PEFT's task type, where PEFT's class for it adds nothing to the model
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def find_base(module: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the base model: the transformers model that holds all adapters, where there is one.

    Else the one child that holds all parameters of a LightningModule, else the module itself, whose name is "".
    """
    if isinstance(module, _FabricModule):
        module = module.module
    # One that was quantized while it was loaded counts when conversion has settled what becomes of it.
    adapted = {id(layer) for layer in adapted_layers(module).values() if layer.loaded is None}
    for name, part in module.named_modules():
        if is_transformers_model(part) and adapted <= {id(layer) for layer in part.modules()}:
            return name, part
    if isinstance(module, LightningModule):
        holders = [(n, c) for n, c in module.named_children() if next(c.parameters(), None) is not None]
        if len(holders) == 1 and not module._parameters:
            name, child = holders[0]
            inner = getattr(child, COMPILED, None)
            return (name, child) if inner is None else (f"{name}.{COMPILED}", inner)
    return "", module


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a transformers model; doesn't import transformers."""
    transformers: Any = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def plain_name(name: str) -> str:
    """A name without what torch.compile put into it."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def task_of(base: nn.Module) -> str | None:
    """PEFT's task type for a base model; None where it has none, or one that would add modules."""
    name = type(base).__name__
    task = next((task for ending, task in TASKS.items() if name.endswith(ending)), None)
    config: Any = getattr(base, "config", None)
    if task == "SEQ_2_SEQ_LM" and not getattr(config, "is_encoder_decoder", False):
        return "CAUSAL_LM"  # models of several media
    return task


def source_of(base: nn.Module) -> str | None:
    """Folder or hub name a transformers model was loaded from."""
    return getattr(getattr(base, "config", None), "_name_or_path", None) or None


def trained_in_full(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with parameters of their own that train and are no adapters; under every name of a shared one."""
    for name, part in base.named_modules(remove_duplicate=False):
        trains = any(p is not None and p.requires_grad for p in part._parameters.values())
        if trains and not isinstance(part, QLoRALinear):
            yield plain_name(name), part


def target_words(layers: list[str], modules: list[str]) -> str | list[str]:
    """PEFT's target_modules for exactly these layers: the ends of their names, else the names, else an expression."""
    for words in ({name.rpartition(".")[2] for name in layers}, set(layers)):
        if {name for name in modules if any(end in words for end in _endings(name))} == set(layers):
            return sorted(words)
    return "|".join(re.escape(name) for name in layers)


def _endings(name: str) -> Iterator[str]:
    """A name, and it without its first part, without its first two, and so on."""
    while name:
        yield name
        name = name.partition(".")[2]


def describe_base(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint must say so that its adapters can be put in PEFT's words without the module; plain values."""
    prefix, base = find_base(module)
    first = next(iter(adapted_layers(base).values()), None)
    return {
        "prefix": plain_name(prefix),
        "task_type": task_of(base),
        "base_model": source_of(base),
        "fan_in_fan_out": any(isinstance(layer, QLoRAConv1D) for layer in base.modules()),
        "quantization": None if first is None else quantization_of_layer(first),
        "target_modules": target_words(
            [plain_name(name) for name in adapted_layers(base)], [plain_name(name) for name, _ in base.named_modules()]
        ),
        "trained_in_full": [name for name, _ in trained_in_full(base)],
    }


def forget_quantizer(module: nn.Module) -> None:
    """Take off transformers' marks of a model that it loaded in 4 bits: it would refuse to move, cast or save it."""
    for part in module.modules():
        if is_transformers_model(part):
            for name in ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit"):
                vars(part).pop(name, None)
            for name in ("quantization_config", "_is_quantized"):
                vars(part.config).pop(name, None)
            # What saving would have to reverse; the 4-bit entries are no part of it any more.
            conversions = vars(part).get("_weight_conversions")
            if conversions:
                part._weight_conversions = [c for c in conversions if not _is_of_a_quantizer(c)]  # type: ignore[assignment]


def _is_of_a_quantizer(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))
