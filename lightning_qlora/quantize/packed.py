"""PackedWeight: a 4-bit weight as a value, and PackedBytes: the same as the uint8 tensors a layer holds."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_qlora.config import BLOCK_SIZES, QuantType, check_choice
from lightning_qlora.quantize import blockwise
from lightning_qlora.quantize.codebooks import codebook, dynamic_map

_BNB_META = "quant_state.bitsandbytes__"


class PackedBytes(NamedTuple):
    """A 4-bit weight as three uint8 tensors: no cast of a module, and no FSDP policy, can change a byte of it.

    Attributes:
        packed: Two codes a byte, ceil(n / 2) bytes in any shape.
        absmax: The 8-bit code of each block's scale, or the bytes of fp32 scales without double quantization.
        nested: The bytes of the fp32 second-level scales followed by the offset; empty without double quantization.
        shape: [out_features, in_features] of the weight, n = out_features * in_features.
        quant_type: "nf4", "fp4" or "int4".
        block_size: Weights that share one scale.
    """

    packed: Tensor
    absmax: Tensor
    nested: Tensor
    shape: tuple[int, int]
    quant_type: QuantType
    block_size: int

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def scales(self) -> Tensor:
        """Scale of every block, fp32 [ceil(n / block_size)]."""
        if not self.nested.numel():
            return aligned(self.absmax).view(torch.float32)
        nested = aligned(self.nested).view(torch.float32)
        return blockwise.dequantize_absmax(self.absmax.reshape(-1), nested[:-1], nested[-1])


def aligned(held: Tensor) -> Tensor:
    """The bytes, flat, where fp32 numbers can be read: those cut out of a larger tensor may begin anywhere in it."""
    flat = held.contiguous().view(-1)
    return flat.clone() if flat.storage_offset() % 4 else flat


@dataclass(frozen=True)
class PackedWeight:
    """A weight in 4 bits, with bitsandbytes' bytes.

    Attributes:
        packed: Codes, two a byte, the first in the high half; uint8 [ceil(n / 2), 1].
        absmax: Scale of each block of the flat weight; uint8 codes, or fp32 without double quantization;
            [ceil(n / block_size)].
        nested_absmax: Second-level scale of every 256 scales, fp32; None without double quantization.
        offset: Mean of the scales, taken off before they were quantized; 0.0 without double quantization.
        shape: Shape of the float weight.
        quant_type: "nf4", "fp4" or "int4".
        block_size: Weights that share one scale.
        dtype: Type of the float weight.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: float
    shape: tuple[int, ...]
    quant_type: QuantType
    block_size: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, second-level scales and offset."""
        nested = 0 if self.nested_absmax is None else self.nested_absmax.nbytes + 4
        return self.packed.nbytes + self.absmax.nbytes + nested

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight again: level * scale in fp32, rounded once to `dtype` (default: the type it came in)."""
        scales = self.absmax
        if self.nested_absmax is not None:
            scales = blockwise.dequantize_absmax(self.absmax, self.nested_absmax, self.offset)
        book = codebook(self.quant_type, str(self.packed.device))
        flat = blockwise.dequantize_4bit(
            self.packed.view(-1), scales, math.prod(self.shape), book, self.block_size, dtype or self.dtype
        )
        return flat.view(self.shape)

    def to(self, device: torch.device) -> "PackedWeight":
        """The same on another device."""
        nested = self.nested_absmax
        return replace(
            self,
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=None if nested is None else nested.to(device),
        )

    def to_bytes(self) -> PackedBytes:
        """The same as uint8 tensors, for a layer to hold; a weight of one dimension counts as one row."""
        shape = (math.prod(self.shape[:-1]), self.shape[-1])
        nested = torch.empty(0, dtype=torch.uint8, device=self.packed.device)
        if self.nested_absmax is not None:
            nested = blockwise.nested_bytes(self.nested_absmax, self.offset)
        return PackedBytes(self.packed, self.absmax.view(torch.uint8), nested, shape, self.quant_type, self.block_size)

    @classmethod
    def from_bytes(cls, weight: PackedBytes, dtype: torch.dtype) -> "PackedWeight":
        """The value behind a layer's uint8 tensors (no copy, but of scales that lie askew)."""
        absmax, nested_absmax, offset = weight.absmax.reshape(-1), None, 0.0
        if weight.nested.numel():
            nested = aligned(weight.nested).view(torch.float32)
            nested_absmax, offset = nested[:-1], nested[-1].item()
        else:
            absmax = aligned(absmax).view(torch.float32)
        return cls(
            weight.packed.reshape(-1, 1), absmax, nested_absmax, offset, weight.shape, weight.quant_type,
            weight.block_size, dtype,
        )  # fmt: skip

    def bnb_state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The entries, keys and bytes, that bitsandbytes' Linear4bit writes (functional.py, QuantState.as_dict)."""
        meta: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        entries = {"absmax": self.absmax, "quant_map": codebook(self.quant_type).levels.to(self.packed.device)}
        if self.nested_absmax is not None:
            meta |= {
                "nested_blocksize": blockwise.NESTED_BLOCK_SIZE,
                "nested_dtype": "float32",
                "nested_offset": self.offset,
            }
            entries["nested_absmax"] = self.nested_absmax
            entries["nested_quant_map"] = dynamic_map(device=self.packed.device)
        entries[_BNB_META + self.quant_type] = torch.tensor(list(json.dumps(meta).encode()), dtype=torch.uint8)
        return {prefix: self.packed, **{f"{prefix}.{name}": value for name, value in entries.items()}}

    @classmethod
    def from_bnb_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> "PackedWeight":
        """Read what `bnb_state_dict` or bitsandbytes wrote, byte for byte.

        Raises:
            ValueError: If an entry is missing, has the wrong size, or names a type or block size that is not ours.
        """
        found = [key for key in state if key.startswith(f"{prefix}.{_BNB_META}")]
        if len(found) != 1 or prefix not in state or f"{prefix}.absmax" not in state:
            raise ValueError(
                f"{prefix}: not a bitsandbytes 4-bit weight; expected {prefix!r}, '{prefix}.absmax' and one "
                f"'{prefix}.{_BNB_META}*' entry, got {sorted(key for key in state if key.startswith(prefix))}."
            )
        meta = json.loads(bytes(state[found[0]].tolist()))
        check_choice(f"{prefix}: quant_type", meta["quant_type"], ("nf4", "fp4", "int4"))
        check_choice(f"{prefix}: blocksize", meta["blocksize"], BLOCK_SIZES)
        nested = f"{prefix}.nested_absmax" in state
        shape, numel = tuple(meta["shape"]), math.prod(meta["shape"])
        packed, absmax = state[prefix], state[f"{prefix}.absmax"]
        # quant_storage: bitsandbytes may keep the same bytes under another type.
        packed = packed.contiguous().view(torch.uint8).reshape(-1, 1)
        if packed.numel() != (numel + 1) // 2 or absmax.numel() != -(-numel // meta["blocksize"]):
            raise ValueError(
                f"{prefix}: a weight of shape {list(shape)} in blocks of {meta['blocksize']} has {(numel + 1) // 2} "
                f"bytes and {-(-numel // meta['blocksize'])} scales; got {packed.numel()} and {absmax.numel()}."
            )
        return cls(
            packed,
            absmax,
            state[f"{prefix}.nested_absmax"] if nested else None,
            meta["nested_offset"] if nested else 0.0,
            shape,
            cast(QuantType, meta["quant_type"]),
            meta["blocksize"],
            getattr(torch, meta["dtype"]),
        )
