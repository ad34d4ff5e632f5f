"""Models larger than memory: quantize while loading, take over 4-bit folders, and write them."""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from lightning_qlora import seams
from lightning_qlora.adapters.base_model import find_base, is_transformers_model, plain_name
from lightning_qlora.bnb_folder import bnb_config, kept_dense, linear_layers, skip_words
from lightning_qlora.bnb_layers import weight_as_it_came
from lightning_qlora.config import BLOCK_SIZES, QLoRAConfig, check_choice
from lightning_qlora.files import INDEX, WEIGHTS, WeightFolder
from lightning_qlora.linear import QLoRALinear, adapted_layers
from lightning_qlora.quantize.packed import PackedWeight
from lightning_qlora.writing import whole_folder

BNB_META = ".quant_state.bitsandbytes__"


@contextmanager
def quantize_while_loading(config: QLoRAConfig) -> Iterator[None]:
    """Within this, every transformers `from_pretrained` quantizes each weight as it is read.

    The model never exists in 16 bits: weights stay memory-mapped until they are quantized, one at a time. A folder of
    bitsandbytes' 4-bit weights is taken over byte for byte. Calls with a `quantization_config` of their own, and models
    in another quantized format, load as they always do. Without transformers 5 it does nothing: weights are then
    quantized when the loaded model is converted.
    """
    if find_spec("transformers") is None or find_spec("transformers.core_model_loading") is None:
        yield
        return
    from lightning_qlora.hf_quantizer import QLoRAQuantizer

    loads: list[list[QLoRAQuantizer]] = []  # quantizers of the calls under way: one may load another

    def quantizer_for(model_config: Any) -> Any:
        stored = getattr(model_config, "quantization_config", None)
        stored = stored if stored is None or isinstance(stored, dict) else stored.to_dict()
        if stored is not None and not stored.get("load_in_4bit"):
            return None
        loads[-1].append(QLoRAQuantizer(config, pre_quantized=stored is not None))
        return loads[-1][-1]

    @contextmanager
    def one_load(folder: str | os.PathLike[str] | None) -> Iterator[None]:
        if folder is not None:
            check_folder(folder)
        loads.append([])
        try:
            yield
        except RuntimeError as error:
            raise next(_reasons(loads[-1], error), error) from error
        finally:
            loads.pop()

    # One call around all: a user's reference to `from_pretrained` may be older than this context.
    with one_load(None), seams.quantizer_of_transformers(quantizer_for, one_load):
        yield


def _reasons(quantizers: list[Any], error: RuntimeError) -> Iterator[ValueError]:
    """The errors behind one of transformers', which has gathered them and names none."""
    for quantizer in quantizers:
        yield from quantizer.misfits if "ignore_mismatched_sizes" in str(error) else quantizer.errors


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Look at all headers of a model's folder before anything is loaded; what is no folder of safetensors passes.

    Raises:
        FileNotFoundError, ValueError: If a file is missing or truncated, the index is wrong, or a 4-bit weight is of a
            type that is not ours; names file and key.
    """
    if not any((Path(folder) / name).is_file() for name in (WEIGHTS, INDEX)):
        return
    found = WeightFolder(folder)
    for key in [key for key in found.entries if BNB_META in key]:
        meta = json.loads(bytes(found.tensors([key])[key].tolist()))
        where = f"{found.file_of[key]}: {key!r}"
        check_choice(f"{where}: quant_type", meta.get("quant_type"), ("nf4", "fp4"))
        check_choice(f"{where}: blocksize", meta.get("blocksize"), BLOCK_SIZES)


def save_quantized(module: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the frozen 4-bit base of a converted module as transformers with bitsandbytes loads it, adapters left out.

    Rank 0 writes; call it on all ranks or on that one.

    Args:
        module: A converted module with one transformers model that holds all 4-bit layers.
        folder: A folder that does not exist yet, or is empty; it is there whole, or not at all.

    Raises:
        ValueError: If there is no such model, or bitsandbytes has no such quantization.
    """
    _, base = find_base(module)
    layers = {plain_name(name): layer for name, layer in adapted_layers(base).items()}
    if not is_transformers_model(base) or not layers:
        raise ValueError(f"{type(module).__name__} holds no converted transformers model, which this is for.")
    for name, layer in layers.items():
        if layer.quant_type == "int4":
            raise ValueError(f"{name}: quant_type 'int4' is none of bitsandbytes'; only 'nf4' and 'fp4' can be saved.")
    rank_zero_only(_write_quantized)(base, layers, Path(folder))


def _write_quantized(base: nn.Module, layers: dict[str, QLoRALinear], folder: Path) -> None:
    first = next(iter(layers.values()))
    model: Any = base
    dtype = str(first.weight_dtype).removeprefix("torch.")
    packed, linear = _packed_weights(base), {plain_name(name) for name in linear_layers(base)}
    dense_again = layers.keys() - packed.keys()
    if dense_again:
        warnings.warn(
            f"transformers keeps {len(dense_again)} of the 4-bit layers dense in a {type(base).__name__} "
            f"({min(dense_again)}, ...), so they are written decoded, as {dtype}.",
            stacklevel=2,
        )
    with whole_folder(folder) as partial:
        model.config.quantization_config = bnb_config(
            first.quant_type, first.nested.numel() > 0, skip_words(linear - packed.keys(), packed), dtype
        )
        try:
            model.save_pretrained(partial, state_dict=_bnb_state_dict(base, packed))
        finally:
            del model.config.quantization_config


def _packed_weights(base: nn.Module) -> dict[str, PackedWeight]:
    """Layer name -> 4-bit weight that goes out: the converted layers', and those that dense layers came in.

    What transformers would keep dense all the same is left out.
    """
    kept, packed = kept_dense(base), {}
    for name, layer in linear_layers(base).items():
        weight = layer.packed_weight if isinstance(layer, QLoRALinear) else weight_as_it_came(layer)
        if weight is not None and name not in kept:
            packed[plain_name(name)] = weight
    return packed


def _bnb_state_dict(base: nn.Module, packed: dict[str, PackedWeight]) -> dict[str, Tensor]:
    """The state dict that the model would have with bitsandbytes' layers in place of these."""
    state: dict[str, Tensor] = {}
    for name, part in base.named_modules(remove_duplicate=False):
        prefix = f"{plain_name(name)}." if name else ""
        own = {**part._parameters, **part._buffers}
        if plain_name(name) in packed:
            entries = packed[plain_name(name)].bnb_state_dict(prefix + "weight")
            state |= {key: value.clone() for key, value in entries.items()}
            own = {"bias": part._parameters["bias"]}
        elif isinstance(part, QLoRALinear):
            own = {"weight": part.decode().contiguous(), "bias": part._parameters["bias"]}
        for key, value in own.items():
            if value is not None and key not in part._non_persistent_buffers_set:
                state[prefix + key] = value.detach()
    return state
