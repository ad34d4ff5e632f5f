"""A module whose tensors have shapes and no data, and what converting it makes of it."""

import copy
import os
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_qlora.adapters.folder import read_adapter
from lightning_qlora.adapters.module import config_of_adapter
from lightning_qlora.choose import choose_layers
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.convert import freeze
from lightning_qlora.linear import QLoRALinear, adapted_layers
from lightning_qlora.quantize.blockwise import NESTED_BLOCK_SIZE
from lightning_qlora.quantize.packed import PackedWeight


def without_data(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and buffers have no data."""
    tensors: dict[int, Any] = {}
    for parameter in module.parameters():
        shape = torch.empty(parameter.shape, dtype=parameter.dtype)
        tensors[id(parameter)] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
    for part in module.modules():
        for value in (*part._buffers.values(), *vars(part).values()):
            if isinstance(value, Tensor):
                tensors[id(value)] = torch.empty(value.shape, dtype=value.dtype)
    return copy.deepcopy(module, tensors)


def model_of(model: Any) -> nn.Module:
    """A transformers model on the meta device, from its config, folder or hub name."""
    try:
        import transformers
    except ImportError as error:
        raise TypeError(
            f"model={model!r}: is no module, and transformers is not installed to make one of it."
        ) from error
    named = isinstance(model, (str, os.PathLike))
    if not named and not isinstance(model, transformers.PretrainedConfig):
        raise TypeError(
            f"model={type(model).__name__}: must be a module, a transformers config, a folder or a hub name."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(model) if named else model
        with torch.device("meta"):
            return _of_config(config)
    except OSError as error:
        raise FileNotFoundError(
            f"{model}: neither a folder with a config.json nor a model on the hub ({in_a_line(error)})."
        ) from error
    except Exception as error:  # whatever a model's own code raises
        where = f"{model}: its config.json" if named else f"model={type(model).__name__}: it"
        raise ValueError(
            f"{where} makes no model ({in_a_line(error)}). Correct it, or pass estimate_memory a module instead."
        ) from error


def _of_config(config: Any) -> nn.Module:
    import transformers

    names = getattr(config, "architectures", None) or []
    kind = getattr(transformers, names[0], None) if names else None
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    if kind is None:
        mapping: Any = transformers.AutoModelForCausalLM._model_mapping
        kind = mapping.get(type(config), None)
    if kind is None:
        return cast(nn.Module, transformers.AutoModel.from_config(config, dtype=dtype))  # type: ignore[no-untyped-call]
    return cast(nn.Module, kind._from_config(config, dtype=dtype))


def convert_twin(twin: nn.Module, config: QLoRAConfig) -> list[QLoRALinear]:
    """Convert as `convert_module` does, without data."""
    if config.adapter is not None:
        config = config_of_adapter(twin, read_adapter(config.adapter), config)
    choice = choose_layers(twin, config)
    for name, layer in choice.convert.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        turned = not isinstance(layer, nn.Linear)
        packed = _packed(weight.T if turned else weight, config)
        QLoRALinear.from_packed(layer, packed, type(layer), config, name)
    freeze(twin, choice)
    return list(adapted_layers(twin).values())


def _packed(weight: Tensor, config: QLoRAConfig) -> PackedWeight:
    blocks = -(-weight.numel() // config.block_size)

    def empty(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype)

    return PackedWeight(
        empty((weight.numel() + 1) // 2, torch.uint8).view(-1, 1),
        empty(blocks, torch.uint8 if config.double_quant else torch.float32),
        empty(-(-blocks // NESTED_BLOCK_SIZE), torch.float32) if config.double_quant else None,
        0.0,
        tuple(weight.shape),
        config.quant_type,
        config.block_size,
        weight.dtype,
    )


def in_a_line(error: Exception) -> str:
    """The kind of an error and the beginning of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
