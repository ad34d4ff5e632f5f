"""bitsandbytes' entries of a 4-bit weight in a state dict: their keys, the JSON object, and what they must hold."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import torch
from torch import Tensor

from lightning_qlora.checks import DAMAGED, check_choice, check_finite, check_number
from lightning_qlora.config import BLOCK_SIZES, QuantType
from lightning_qlora.quantization.blockwise import FLOATS, NESTED_BLOCK_SIZE

META = "quant_state.bitsandbytes__"
AVERAGED = "Code that averages state dicts has to leave out what is not floating point."


def bnb_meta(
    prefix: str, shape: Sequence[int], quant_type: str, block_size: int, dtype: torch.dtype, more: Mapping[str, Any]
) -> dict[str, Tensor]:
    meta = {
        "quant_type": quant_type,
        "blocksize": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": [*shape],
        **more,
    }
    return {f"{prefix}.{META}{quant_type}": json_bytes(meta)}


def json_bytes(values: Mapping[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(values).encode()), dtype=torch.uint8)


def bnb_keys(prefix: str) -> list[str]:
    metas = (META + quant_type for quant_type in get_args(QuantType))
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *metas)
    return [prefix, *(f"{prefix}.{name}" for name in names)]


def read_bnb_meta(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any] | None:
    """The JSON object in bitsandbytes' `quant_state` entry of a weight, its values checked; None if there is none."""
    for quant_type in get_args(QuantType):
        key = f"{prefix}.{META}{quant_type}"
        if key in state:
            return read_meta(prefix, key, state[key])
    return None


def read_meta(prefix: str, key: str, entry: Tensor) -> dict[str, Any]:
    try:
        meta = json.loads(bytes(entry.tolist()))
        quant_type, block_size, dtype, shape = (meta[name] for name in ("quant_type", "blocksize", "dtype", "shape"))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{key}: must be the bytes of a JSON object with quant_type, blocksize, dtype and shape "
            f"({type(error).__name__}: {error}). {DAMAGED} {AVERAGED}"
        ) from error
    check_choice(f"{prefix}: quant_type", quant_type, get_args(QuantType))
    if not key.endswith(META + quant_type):
        raise ValueError(f"{key}: has quant_type={quant_type!r}, which is not the one in its name.")
    check_choice(f"{prefix}: blocksize", block_size, BLOCK_SIZES)
    check_choice(f"{prefix}: dtype", dtype, tuple(str(kind).removeprefix("torch.") for kind in FLOATS))
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{prefix}: shape={shape!r}: must be a list of positive integers.")
    if "nested_offset" in meta:
        check_choice(f"{prefix}: nested_blocksize", meta.get("nested_blocksize"), (NESTED_BLOCK_SIZE,))
        check_choice(f"{prefix}: nested_dtype", meta.get("nested_dtype"), ("float32",))
        check_number(f"{prefix}: nested_offset", meta["nested_offset"])
    return cast(dict[str, Any], meta)


def check_values(key: str, values: Tensor | None, count: int, dtype: torch.dtype) -> None:
    """Refuse an entry of another size or type than the JSON entry says; with `count` 0 there must be none."""
    if values is None and not count:
        return
    if values is None or not count or values.numel() != count or values.dtype is not dtype:
        content = "no such entry"
        if values is not None:
            content = f"{values.numel()} of {values.dtype}"
        raise ValueError(f"{key}: must hold {count} values of {dtype}; got {content}. {DAMAGED}")
    if dtype.is_floating_point:
        check_finite(f"{key}:", values, DAMAGED)


def check_levels(key: str, state: Mapping[str, Tensor], levels: Tensor) -> None:
    saved = state.get(key)
    if saved is None:
        return
    if saved.shape != levels.shape or not torch.allclose(saved.float().cpu(), levels, atol=1e-6):
        raise ValueError(f"{key}: is not the table of levels of this type: the file is of another format. {DAMAGED}")
