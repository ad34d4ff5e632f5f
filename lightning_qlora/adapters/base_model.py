"""The base model inside a LightningModule: PEFT and vLLM would load that one, so its names are used for adapters."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn

from lightning_qlora.adapters.adapter import Adapter, ExpertStack, LayerAdapter, round_alpha
from lightning_qlora.adapters.base_compatibility import check_one_folder, quantization_of_layer
from lightning_qlora.adapters.peft_experts import stacks_of
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.dotted_names import (
    COMPILED,
    join,
    last_part,
    name_endings,
    parameter_and_number,
    plain_name,
)
from lightning_qlora.layers.experts import experts_of
from lightning_qlora.layers.initialization.difference import InitializationRecord
from lightning_qlora.layers.initialization.methods import changes_base_weights
from lightning_qlora.layers.names import is_transformers_model, only_child_of
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.layers.records import is_base, own_parameters
from lightning_qlora.layers.trainable_tokens import TokenAdapter, token_indices
from lightning_qlora.lightning_copies import classes

OF_LAYER = (  # arguments that may differ between the layers of a module
    "quant_type", "block_size", "double_quant", "compute_dtype", "r", "lora_alpha", "lora_dropout", "use_rslora",
    "use_dora",
)  # fmt: skip
OF_ADAPTER = ("task_type", "base_model", "fan_in_fan_out", "quantization", "target_modules")  # in `describe_base` too


def find_base_model(module: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the base model: the transformers model that holds all adapters, if there is one.

    Else the only child with parameters of a LightningModule, else the module itself, whose name is "".
    """
    if isinstance(module, classes(_FabricModule)):
        module = module.module
    adapted = {id(layer) for layer in adapted_layers(module).values()}
    for name, part in module.named_modules():
        if is_transformers_model(part) and adapted <= {id(layer) for layer in part.modules()}:
            return name, part
    name = only_child_of(module)
    if name is None:
        return "", module
    inner = getattr(module.get_submodule(name), COMPILED, None)
    return (name, module.get_submodule(name)) if inner is None else (f"{name}.{COMPILED}", inner)


def describe_base(module: nn.Module, config: QLoRAConfig) -> dict[str, Any]:
    """What a checkpoint with these arguments must say of the base model to write a PEFT folder without the module."""
    prefix, base = find_base_model(module)
    modules = [(plain_name(name), layer) for name, layer in base.named_modules(remove_duplicate=False)]
    layers = {name: layer for name, layer in modules if isinstance(layer, QLoRALinear)}
    stacks, first = stacks_of(base), next(iter(layers.values()), None)
    return {
        "prefix": plain_name(prefix),
        "task_type": _task_type(base),
        "base_model": _name_of(base),
        "fan_in_fan_out": any(layer._transposed for layer in layers.values()),
        "quantization": None if first is None else quantization_of_layer(first),
        "target_modules": target_modules_of(base),
        **({"experts": {name: list(stack) for name, stack in stacks.items()}} if stacks else {}),
        **({"tokens": tokens} if (tokens := token_indices(base)) else {}),
        "trained_in_full": list(trained_in_full(module)),
        "seed_names": {
            name: layer.seed_name for name, layer in layers.items() if layer.seed_name != _usual_seed_name(name)
        },
        "layers": {name: own for name, layer in layers.items() if (own := _own_arguments(layer.config, config))},
    }


def adapter_on_base(
    description: Mapping[str, Any], configs: dict[str, QLoRAConfig],
    tensors: Mapping[str, tuple[Tensor, Tensor, Tensor | None]], input_rms: dict[str, Tensor],
    fingerprint_of: Callable[[str], int | None], **others: Any,
) -> Adapter:  # fmt: skip
    """An adapter from `describe_base`, and from what each layer has, by its name in the base model.

    `tensors` are lora_A, lora_B and the magnitudes; `input_rms` and `fingerprint_of` as in `InitializationRecord`.
    ValueError if an adapter folder has no place for layers with these arguments.
    """
    check_one_folder(configs)
    use_rslora, first = all(config.use_rslora for config in configs.values()), next(iter(configs.values()))
    # With one `use_rslora` for all layers, the alpha is such that the scaling of each layer stays the same.
    alphas = {
        name: config.lora_alpha if config.use_rslora == use_rslora else round_alpha(config.scaling * config.r)
        for name, config in configs.items()
    }
    known = description["quantization"]  # adapters from a folder may have another initialization than the arguments
    config = first.with_initialization(known["init_lora_weights"], known.get("loftq_config"))
    seeds = {name: seed_name_of(description, name) for name in configs}
    return Adapter(
        layers={name: LayerAdapter(a, b, alphas[name], magnitude) for name, (a, b, magnitude) in tensors.items()},
        experts={name: ExpertStack(*stack) for name, stack in description.get("experts", {}).items()},
        modules_to_save=sorted(description["trained_in_full"]),
        tokens=description.get("tokens", {}),
        use_rslora=use_rslora,
        lora_dropout=first.lora_dropout,
        origin=InitializationRecord(config, seeds, input_rms, fingerprint_of),
        **{name: description[name] for name in OF_ADAPTER},
        **others,
    )


def _own_arguments(of_layer: QLoRAConfig, config: QLoRAConfig) -> dict[str, Any]:
    """The arguments in which a layer differs from those of the module."""
    names: tuple[str, ...] = OF_LAYER
    if changes_base_weights(of_layer) or changes_base_weights(config):
        names = (*names, "init_lora_weights", "loftq_config")
    return {name: value for name in names if (value := getattr(of_layer, name)) != getattr(config, name)}


def config_of_layer(description: Mapping[str, Any], name: str, config: QLoRAConfig) -> QLoRAConfig:
    """The arguments of a layer, by its name in the base model, from those of the module and `describe_base`."""
    return config.with_own(description.get("layers", {}).get(name, {}))


def seed_name_of(description: Mapping[str, Any], name: str) -> str:
    """The name that the seed of the adapter of a layer, of this name in the base model, was made from."""
    return str(description.get("seed_names", {}).get(name, _usual_seed_name(name)))


def _usual_seed_name(name: str) -> str:
    """The name that the seed of a layer's adapter is made from; for expert i of a parameter NAME it is NAME.i."""
    found = parameter_and_number(name)
    return name if found is None else join(found[0], str(found[1]))


def trained_in_full(module: nn.Module) -> dict[str, nn.Module]:
    """Everything in the base model that is no adapter and trains, or has changed since conversion, by its name.

    That is what trained before it was frozen, and a resized embedding. A shared module has several names, but the rows
    of a tied embedding have one, as in PEFT's files.
    """
    return _holders_of_trained(find_base_model(module)[1])


def trained_outside(module: nn.Module) -> list[str]:
    """Names of the same outside of the base model, as a head of the LightningModule."""
    inside = set(find_base_model(module)[1].modules())
    return [name for name, part in _holders_of_trained(module).items() if part not in inside]


def _holders_of_trained(module: nn.Module) -> dict[str, nn.Module]:
    first = dict(module.named_modules())
    return {
        plain_name(name): part
        for name, part in module.named_modules(remove_duplicate=False)
        if not isinstance(part, QLoRALinear)
        and (name in first or not isinstance(part, TokenAdapter))
        and any(p.is_floating_point() and not is_base(part, key, p) for key, p in own_parameters(part).items())
    }


def _name_of(base: nn.Module) -> str | None:
    """Folder or hub name that a transformers model was loaded from; its name is "None" if it was not loaded."""
    name = getattr(getattr(base, "config", None), "_name_or_path", None)
    return None if name in ("", "None") else name


def _task_type(base: nn.Module) -> str | None:
    """PEFT's task type of a base model; None if it has none, or one whose class would add modules."""
    name, config = type(base).__name__, getattr(base, "config", None)
    if name.endswith("ForConditionalGeneration") and getattr(config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"  # without an encoder: multimodal models
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) else None


def target_modules_of(base: nn.Module, without: Collection[str] = ()) -> str | list[str]:
    """PEFT's target_modules for exactly the converted linear layers: last names, full names, or an expression."""
    experts, modules = experts_of(base), [plain_name(name) for name, _ in base.named_modules()]
    names = [plain_name(name) for name, layer in adapted_layers(base).items() if layer not in experts]
    layers = [name for name in names if name not in without]
    for endings in ({last_part(name) for name in layers}, set(layers)):
        if {name for name in modules if not endings.isdisjoint(name_endings(name))} == set(layers):
            return sorted(endings)
    return "|".join(re.escape(name) for name in layers)
