"""Layers that were quantized while they were loaded, when the attribute the model will stand under was not known yet.

Their names were those of the transformers model then. What a full name decides (whether a layer is 4-bit at all, its
rank, its scaling, the seed of its start) conversion decides, and makes good here: an adapter is started again, a weight
that is to stay dense is read again from its file.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_qlora import starts
from lightning_qlora.bnb_layers import remember_packed
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.files import open_safetensors
from lightning_qlora.kernels import ops
from lightning_qlora.linear import QLoRALinear, check_start_of_packed
from lightning_qlora.merging.module import to_dense


@dataclass(frozen=True)
class Loaded:
    """What a layer was quantized from.

    Attributes:
        dtype: Type its weight was loaded in.
        packed: The file holds it in 4 bits, and no float weight.
        path: File of the float weight; None where it is not one tensor of one file.
        key: Its key there.
    """

    dtype: torch.dtype
    packed: bool = False
    path: Path | None = None
    key: str = ""


def config_while_loading(config: QLoRAConfig) -> QLoRAConfig:
    """The choices with the default start: one that is computed from the weight is made at conversion, once."""
    if not config.starts_from_weight:
        return config
    return config.with_start("default")


def may_need_weight(config: QLoRAConfig) -> bool:
    """Whether conversion may want the float weight of a layer again: for its start, or because of its full name."""
    names = (config.exclude_modules, config.modules_to_save, config.rank_pattern)
    return config.starts_from_weight or config.target_modules != "all-linear" or any(names)


@torch.no_grad()
def settle(layer: QLoRALinear, config: QLoRAConfig, name: str, device: torch.device | None = None) -> None:
    """Make a loaded layer what conversion makes of a dense one; an adapter that was given values since stays.

    Args:
        layer: The layer.
        config: The choices.
        name: Its full name.
        device: Where to compute its start; None: where it is.

    Raises:
        ValueError: If the float weight is needed and is not there any more.
    """
    loaded: Loaded = layer.loaded
    if loaded.packed:
        check_start_of_packed(config)
    again = not loaded.packed and (config.starts_from_weight or _quantization(layer.config) != _quantization(config))
    again = again or (loaded.path is not None and layer.weight_dtype is not loaded.dtype)  # cast since
    given = bool(layer.lora_B.any())
    weight = weight_again(layer) if again and not given else None
    layer.config, layer.full_name, layer.lora_dropout, layer.loaded = config, name, config.lora_dropout, None
    if given:
        return
    layer.scaling = config.scaling_of(name)
    if weight is not None:
        layer.start(weight, device)
        return
    lora_a, lora_b = starts.random_adapter(layer.in_features, layer.out_features, config, name)
    layer.write("lora_A", lora_a)
    if layer.lora_B.shape != lora_b.shape:  # else it is zero, and takes no memory as long as nobody writes to it
        layer.write("lora_B", lora_b)
    layer.set_magnitudes()


def make_dense(layer: QLoRALinear) -> None:
    """Make a loaded layer the dense one that it would be had loading not quantized it, in place."""
    if not layer.loaded.packed:
        to_dense(layer, weight_again(layer))
        return
    came = layer.packed_weight
    to_dense(layer, layer.decode().contiguous())
    remember_packed(layer, came)


def weight_again(layer: QLoRALinear) -> Tensor:
    """The float weight of a loaded layer, shaped as the dense layer's, in the type and place the layer has now.

    Raises:
        FileNotFoundError, ValueError: If it is not one tensor of a file, or that file has changed.
    """
    loaded: Loaded = layer.loaded
    if loaded.path is None:
        raise ValueError(
            "its weight was quantized while it was loaded, and is not one tensor of a file that could be read again. "
            "Load the model in __init__, outside of plugin.init()."
        )
    with open_safetensors(loaded.path) as file:
        weight: Tensor = file.get_tensor(loaded.key).to(loaded.dtype)
    rows, config = layer._as_rows(weight).to(layer.packed.device), layer.config
    quantized = ops.quantize(rows, config.quant_type, config.block_size, config.double_quant).to_bytes()
    if not torch.equal(quantized.packed.view(-1), layer.packed.view(-1)):
        raise ValueError(
            f"{loaded.path}: {loaded.key!r} is no longer the weight that was loaded, and it is needed again now that "
            "the layer's full name is known. Load the model in __init__, outside of plugin.init()."
        )
    return weight.to(layer.packed.device, layer.weight_dtype)


def _quantization(config: QLoRAConfig) -> tuple[str, int, bool]:
    return config.quant_type, config.block_size, config.double_quant
