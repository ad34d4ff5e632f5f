"""Folders in bitsandbytes' 4 bits: writing them, and which layers transformers converts when it loads them.

Source: transformers 5, quantizers/quantizers_utils.py (should_convert_module), quantizers/quantizer_bnb_4bit.py and
integrations/bitsandbytes.py (replace_with_bnb_linear): every nn.Linear and Conv1D becomes a Linear4bit unless an entry
of the folder's `llm_int8_skip_modules`, or of the model's own `_keep_in_fp32_modules`, matches its name.
"""

import json
import os
import re
import warnings
from collections.abc import Collection, Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_qlora.adapters.base_model import find_base_model
from lightning_qlora.files.folder_writer import atomic_folder
from lightning_qlora.files.safetensors_folder import read_json
from lightning_qlora.layers.dotted_names import last_part, parameter_name, plain_name
from lightning_qlora.layers.experts import QLoRAExperts, expert_stacks, experts_of
from lightning_qlora.layers.kinds import is_linear, original_packed_weight
from lightning_qlora.layers.names import is_transformers_model
from lightning_qlora.layers.packed_linear import PackedLayer
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.layers.trainable_tokens import TokenAdapter
from lightning_qlora.quantization.codebooks import OF_BITSANDBYTES
from lightning_qlora.quantization.packed_weight import PackedWeight


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer, in 4 bits or not; not experts of a parameter."""
    experts = experts_of(model)
    return {name: layer for name, layer in model.named_modules() if is_linear(layer) and layer not in experts}


def always_dense_layers(model: nn.Module) -> set[str]:
    """Names of the linear layers that transformers keeps dense for every folder, such as T5's `wo`.

    Also of layers whose name ends in "weight" (`block_inject_weight` of Qwen4Exp): transformers takes that for the name
    of a parameter, and does not find their scales.
    """
    words: Any = getattr(model, "_keep_in_fp32_modules", None) or ()
    dense, replaced = set(), (nn.Linear, import_module("transformers.pytorch_utils").Conv1D)
    for name, layer in linear_layers(model).items():
        kind = getattr(layer, "dense_class", type(layer))  # the class before conversion
        if kind not in replaced or any(_skips(word, name) for word in words) or "weight." in f"{name}.":
            dense.add(name)
    return dense


def skip_modules(dense: Iterable[str], packed: Collection[str]) -> list[str]:
    """`llm_int8_skip_modules` that match these dense layers and none of the packed ones.

    A plain name also matches every name that ends in it ("classifier" matches "pre_classifier"). Where that is a 4-bit
    layer, the entry is a regular expression for the whole name: no name ends in "$".
    """
    return [f"{re.escape(name)}$" if any(_skips(name, other) for other in packed) else name for name in sorted(dense)]


def _skips(word: str, name: str) -> bool:
    """Whether transformers leaves a layer of this name dense because of this entry."""
    should_convert = getattr(import_module("transformers.quantizers.quantizers_utils"), "should_convert_module", None)
    if should_convert is None:  # transformers 4: integrations/bitsandbytes.py, _replace_with_bnb_linear
        return name == word or f"{word}." in name or last_part(name) == word
    return not should_convert(name, [word])


def bnb_config(quant_type: str, double_quant: bool, skip: list[str], dtype: str) -> dict[str, Any]:
    """transformers' quantization_config of a folder in bitsandbytes' 4 bits."""
    config: Any = import_module("transformers").BitsAndBytesConfig(
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage="uint8",
        llm_int8_skip_modules=skip,
    )
    config.load_in_4bit = True  # as an argument it makes transformers 4 ask for bitsandbytes
    return dict(config.to_dict())


def save_quantized(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the frozen 4-bit base of a converted module, without adapters, as transformers with bitsandbytes loads it.

    Rank 0 writes; call it on all ranks or on that one. Experts that are one parameter are written decoded, with a
    warning: bitsandbytes has no format for them.

    Args:
        module: A converted module with one transformers model that holds all 4-bit layers.
        folder: A folder that does not exist yet, or is empty; it is complete or absent, at any moment.

    Raises:
        ValueError: If there is no such model, or bitsandbytes has no such quantization.
    """
    _, base = find_base_model(module)
    layers = {plain_name(name): layer for name, layer in adapted_layers(base).items()}
    if not is_transformers_model(base) or not layers:
        raise ValueError(f"{type(module).__name__} holds no converted transformers model, which this is for.")
    for name, layer in layers.items():
        if layer.quant_type not in OF_BITSANDBYTES:
            raise ValueError(
                f"{name}: bitsandbytes has no quant_type {layer.quant_type!r}; only {OF_BITSANDBYTES} can be saved."
            )
    rank_zero_only(_write_quantized)(base, layers, Path(folder))


def _write_quantized(base: Any, layers: dict[str, QLoRALinear], folder: Path) -> None:
    first = next(iter(layers.values()))
    dtype = str(first.weight_dtype).removeprefix("torch.")
    packed, linear = _packed_weights(base), {plain_name(name) for name in linear_layers(base)}
    stacks, dense_again = [plain_name(name) for name, *_ in expert_stacks(base)], linear & layers.keys() - packed.keys()
    for why, decoded in (
        ("bitsandbytes has no 4-bit format for parameters of experts", stacks),
        (f"transformers keeps these layers of a {type(base).__name__} dense", sorted(dense_again)),
    ):
        if decoded:
            warnings.warn(f"{why}: {len(decoded)} ({decoded[0]}, ...) are written decoded, as {dtype}.", stacklevel=2)
    skip = skip_modules(linear - packed.keys(), packed)
    with atomic_folder(folder) as partial:
        state, how = _bnb_state_dict(base, packed), _format(base, packed)
        names = names_in_files(base, packed, state) if how else {}
        state = {name_in_files(key, names): value for key, value in state.items()}
        base.save_pretrained(partial, state_dict=state, **how)
        config = read_json(partial / "config.json")
        config["quantization_config"] = bnb_config(first.quant_type, first.nested.numel() > 0, skip, dtype)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _format(base: Any, packed: Iterable[str]) -> dict[str, bool]:
    """Arguments of save_pretrained: use the model's own names, where transformers could not load the original ones.

    It joins q, k and v of NomicBert into one tensor, as the original files have them, and can't split 4-bit weights
    again. And a LlamaForCausalLM from a folder of EXAONE 3.0 would get EXAONE's names, but Llama's config.json.
    """
    if find_spec("transformers.conversion_mapping") is None:
        return {}
    mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping(base, add_legacy=False)
    reverse = [entry.reverse_transform() for entry in mapping if hasattr(entry, "operations")]
    joined = any(entry.rename_source_key(f"{name}.weight")[1] is not None for entry in reverse for name in packed)
    for entry in reverse:  # a Transpose with `check_dims` asks the model for a dense parameter (Qwen3-VL-MoE)
        if any(getattr(operation, "check_dims", False) for operation in entry.operations):
            joined |= any(entry.rename_source_key(plain_name(name))[1] for name, *_ in expert_stacks(base))
    other_type = base.config.to_dict().get("model_type") != base.config.model_type
    return {"save_original_format": False} if joined or other_type else {}


def names_in_files(base: Any, layers: Iterable[str], state: Collection[str]) -> dict[str, str]:
    """Layer -> its name in a 4-bit folder, for the layers that can't be loaded by the model's own names.

    transformers loads every parameter by its own name too (`state` has these), but renames the scales of a 4-bit
    weight: they are no parameters of the model.
    """
    if find_spec("transformers.conversion_mapping") is None:
        return {}
    loading = import_module("transformers.core_model_loading")
    get_mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping
    mapping, saving = get_mapping(base), get_mapping(base, add_legacy=False)
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    others = [entry for entry in mapping if not isinstance(entry, loading.WeightRenaming)]
    reverse = [entry.reverse_transform() for entry in reversed(saving) if isinstance(entry, loading.WeightRenaming)]
    rules, found = (renamings, others, base.base_model_prefix, state), {}
    for layer in layers:
        key = name = f"{layer}.weight"
        for entry in reverse:
            key, _ = entry.rename_source_key(key)
        loaded_as, key_loaded_as = (loading.rename_source_key(k, *rules) for k in (name, key))
        if loaded_as != (name, None) and key_loaded_as == (name, None):
            found[layer] = key.removesuffix(".weight")
    return found


def name_in_files(key: str, layers: dict[str, str]) -> str:
    """The name of a tensor with the name of its layer replaced, as `names_in_files` says."""
    layer, weight, rest = key.partition(".weight")
    return layers.get(layer, layer) + weight + rest


def _packed_weights(base: nn.Module) -> dict[str, PackedWeight]:
    """Layer name -> 4-bit weight to write, of converted layers and of dense ones that were decoded from 4 bits.

    Layers that transformers keeps dense are left out.
    """
    kept = always_dense_layers(base)
    weights = {
        plain_name(name): layer.packed_weight if isinstance(layer, QLoRALinear) else original_packed_weight(layer)
        for name, layer in linear_layers(base).items()
        if name not in kept
    }
    return {name: weight for name, weight in weights.items() if weight is not None}


def _bnb_state_dict(base: nn.Module, packed: dict[str, PackedWeight]) -> dict[str, Tensor]:
    """The state dict that the model would have with bitsandbytes' layers in place of the packed ones."""
    state, experts = dict[str, Tensor](), experts_of(base)
    for name, part in base.named_modules(remove_duplicate=False):
        prefix = f"{plain_name(name)}." if name else ""
        if isinstance(part, (QLoRAExperts, TokenAdapter)) or part in experts:
            continue  # written with the module that held the parameter, or no part of the base
        own = {**part._parameters, **part._buffers}
        for key, stack in part._modules.items():
            if isinstance(stack, QLoRAExperts):
                own[parameter_name(key)] = stack.decode()
        if weight := packed.get(plain_name(name)):
            state |= {key: value.clone() for key, value in weight.bnb_state_dict(prefix + "weight").items()}
            own = {"bias": part._parameters["bias"]}
        elif isinstance(part, PackedLayer):
            own = {"weight": part.decode().contiguous(), "bias": part._parameters.get("bias")}
        for key, value in own.items():
            if value is not None and key not in part._non_persistent_buffers_set:
                state[prefix + key] = value.detach()
    return state
