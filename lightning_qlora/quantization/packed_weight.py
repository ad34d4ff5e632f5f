"""PackedWeight, a 4-bit weight as users see it, and PackedBytes, the same weight as the uint8 tensors of a layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_qlora.checks import check_choice
from lightning_qlora.config import BLOCK_SIZES, QuantType
from lightning_qlora.quantization import blockwise
from lightning_qlora.quantization.bnb_entries import META, bnb_meta, check_levels, check_values, read_meta
from lightning_qlora.quantization.codebooks import codebook, dynamic_map


class PackedBytes(NamedTuple):
    """A 4-bit weight as three uint8 tensors, whose bytes no `module.to(dtype)` and no FSDP policy can change.

    Of a stack of experts, shape is [experts, out_features, in_features], and each tensor has a row for each expert.
    """

    packed: Tensor  # two codes per byte, ceil(n / 2) bytes in any shape
    absmax: Tensor  # the 8-bit code of each block's scale, or the bytes of fp32 scales without double quantization
    nested: Tensor  # with double quantization, the bytes of the fp32 second-level scales and, last, of the offset
    shape: tuple[int, ...]  # [out_features, in_features], n = out_features * in_features
    quant_type: QuantType
    block_size: int  # weights that share one scale

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def unbind(self) -> "list[PackedBytes]":
        """The matrices of a stack; a matrix alone."""
        if len(self.shape) == 2:
            return [self]
        return [self.expert(number) for number in range(self.shape[0])]

    def expert(self, number: int) -> "PackedBytes":
        """One matrix of a stack, as views."""
        packed, absmax, nested = (tensor[number] for tensor in self[:3])
        return self._replace(packed=packed, absmax=absmax, nested=nested, shape=self.shape[1:])

    def to(self, device: torch.device, copy: bool = False) -> "PackedBytes":
        packed, absmax, nested = (tensor.to(device, copy=copy) for tensor in self[:3])
        return self._replace(packed=packed, absmax=absmax, nested=nested)

    def dequantize_into(self, out: Tensor) -> Tensor:
        """Decode into `out`, flat [n], of any of the three float types, in plain torch; returns it."""
        levels = codebook(self.quant_type, str(self.packed.device))
        scales = scales_of(self.absmax, self.nested)
        return blockwise.dequantize_4bit(out, self.packed.reshape(-1), scales, levels, self.block_size)


def scales_of(absmax: Tensor, nested: Tensor, numbers: Tensor | None = None) -> Tensor:
    """Scale of every block, fp32 [ceil(n / block_size)]; `numbers`: see `blockwise.dequantize_absmax`."""
    if not nested.numel():
        return aligned(absmax).view(-1).view(torch.float32)
    second = aligned(nested).view(-1).view(torch.float32)
    return blockwise.dequantize_absmax(absmax.reshape(-1), second[:-1], second[-1], numbers)


def stack_bytes(weights: Sequence[PackedBytes]) -> PackedBytes:
    """The stack of some matrices; the reverse of `PackedBytes.unbind`."""
    first = weights[0]
    packed, absmax, nested = (
        torch.stack([tensor.flatten() for tensor in tensors])
        for tensors in zip(*(weight[:3] for weight in weights), strict=True)
    )
    return PackedBytes(packed, absmax, nested, (len(weights), *first.shape), first.quant_type, first.block_size)


def check_bytes(weight: PackedBytes) -> None:
    """Raise ValueError for a wrong number of bytes: kernels get addresses and would read past the end of a tensor.

    The three tensors must be on one device too: an address on another one ends the process.
    """
    packed, absmax, nested = weight[:3]
    sizes = _sizes(weight.shape, weight.block_size, nested.numel() > 0)
    has_sizes = (packed.numel(), absmax.numel(), nested.numel()) == sizes
    if has_sizes and packed.dtype is absmax.dtype is nested.dtype is torch.uint8:
        if packed.device == absmax.device == nested.device:
            return
        raise ValueError(
            f"A 4-bit weight has its codes on {packed.device}, its scales on {absmax.device} and its second-level "
            f"scales on {nested.device}. Move all to one device."
        )
    raise ValueError(
        f"A 4-bit weight {list(weight.shape)} in blocks of {weight.block_size} has {sizes[0]} bytes of codes, "
        f"{sizes[1]} of scales and {sizes[2]} of second-level scales, all uint8; got "
        f"{', '.join(f'{each.numel()} {each.dtype}' for each in (packed, absmax, nested))}."
    )


@cache
def _sizes(shape: tuple[int, ...], block_size: int, double_quant: bool) -> tuple[int, int, int]:
    check_choice("block_size", block_size, BLOCK_SIZES)
    *experts, rows, columns = shape
    count = math.prod(experts)
    codes = (rows * columns + 1) // 2
    blocks = -(-rows * columns // block_size)
    if not double_quant:
        return count * codes, count * 4 * blocks, 0
    nested = -(-blocks // blockwise.NESTED_BLOCK_SIZE) + 1
    return count * codes, count * blocks, count * 4 * nested


def aligned(data: Tensor) -> Tensor:
    """Contiguous bytes that can be read as fp32: a copy if FSDP cut them out of a larger tensor at another byte."""
    if data.is_contiguous() and data.storage_offset() % 4 == 0:
        return data
    return data.reshape(-1).clone()


@dataclass(frozen=True, repr=False)
class PackedWeight:
    """A 4-bit weight with the same bytes as in bitsandbytes.

    Attributes:
        packed: Codes, two per byte, the first in the high half; uint8 [ceil(n / 2), 1].
        absmax: Scale of each block of the flat weight; uint8 codes, or fp32 without double quantization;
            [ceil(n / block_size)].
        nested_absmax: Second-level scale of every 256 scales, fp32; None without double quantization.
        offset: Mean of the scales, subtracted before they were quantized; 0.0 without double quantization.
        shape: Shape of the float weight.
        quant_type: 4-bit data type.
        block_size: Weights that share one scale.
        dtype: Type of the float weight.

    Example:
        ```python
        import torch
        from lightning_qlora import PackedWeight, quantize

        packed = quantize(torch.randn(64, 64))
        state = packed.bnb_state_dict()  # the keys and bytes of bitsandbytes
        again = PackedWeight.from_bnb_state_dict(state)
        assert torch.equal(again.dequantize(), packed.dequantize())
        ```
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: float
    shape: tuple[int, ...]
    quant_type: QuantType
    block_size: int
    dtype: torch.dtype

    def __repr__(self) -> str:
        return (
            f"PackedWeight({list(self.shape)}, {self.quant_type}, block_size={self.block_size}, "
            f"double_quant={self.nested_absmax is not None}, {self.dtype}, {self.nbytes:,} bytes, {self.packed.device})"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, second-level scales and offset."""
        nbytes = self.packed.nbytes + self.absmax.nbytes
        if self.nested_absmax is not None:
            nbytes += self.nested_absmax.nbytes + 4
        return nbytes

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight: level * scale in fp32, rounded once to `dtype` (default: the type of the original)."""
        out = self.packed.new_empty(math.prod(self.shape), dtype=dtype or self.dtype)
        return self.to_bytes().dequantize_into(out).view(self.shape)

    def to(self, device: torch.device) -> "PackedWeight":
        """The same weight on another device."""
        tensors: Any = {key: value.to(device) for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def to_bytes(self) -> PackedBytes:
        """The uint8 tensors that a layer stores; a weight of one dimension becomes one row."""
        shape = (math.prod(self.shape[:-1]), self.shape[-1])
        nested = torch.empty(0, dtype=torch.uint8, device=self.packed.device)
        if self.nested_absmax is not None:
            nested = blockwise.nested_bytes(self.nested_absmax, self.offset)
        return PackedBytes(self.packed, self.absmax.view(torch.uint8), nested, shape, self.quant_type, self.block_size)

    @classmethod
    def from_bytes(cls, weight: PackedBytes, dtype: torch.dtype) -> "PackedWeight":
        """The weight that a layer stores as uint8 tensors, with or without values; copied if scales are misaligned."""
        absmax = weight.absmax.reshape(-1)
        nested_absmax = None
        offset = 0.0
        if weight.nested.numel():
            nested = aligned(weight.nested).view(-1).view(torch.float32)
            nested_absmax = nested[:-1]
            if not (nested.is_meta or isinstance(nested, FakeTensor)):
                offset = nested[-1].item()
        else:
            absmax = aligned(absmax).view(torch.float32)
        return cls(
            packed=weight.packed.reshape(-1, 1),
            absmax=absmax,
            nested_absmax=nested_absmax,
            offset=offset,
            shape=weight.shape,
            quant_type=weight.quant_type,
            block_size=weight.block_size,
            dtype=dtype,
        )

    def bnb_state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The state dict of bitsandbytes' Linear4bit: its keys and bytes (functional.py, QuantState.as_dict)."""
        meta: dict[str, Any] = {}
        entries = {"absmax": self.absmax, "quant_map": codebook(self.quant_type).levels.to(self.packed.device)}
        if self.nested_absmax is not None:
            meta |= {"nested_blocksize": blockwise.NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
            meta["nested_offset"] = self.offset
            entries["nested_absmax"] = self.nested_absmax
            entries["nested_quant_map"] = dynamic_map(device=self.packed.device)
        state = {prefix: self.packed}
        for name, value in entries.items():
            if value.is_floating_point():  # averages of state dicts write to it, and the tables are shared by weights
                value = value.clone()
            state[f"{prefix}.{name}"] = value
        return state | bnb_meta(prefix, self.shape, self.quant_type, self.block_size, self.dtype, meta)

    @classmethod
    def from_bnb_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "weight") -> "PackedWeight":
        """Read entries that `bnb_state_dict` or bitsandbytes wrote, without requantizing.

        Raises:
            TypeError, ValueError: If an entry is missing, has the wrong size or type, contradicts another or holds NaN
                or Inf, or if the type or block size is not supported.
        """
        meta_keys = [key for key in state if key.startswith(f"{prefix}.{META}")]
        if len(meta_keys) != 1 or prefix not in state or f"{prefix}.absmax" not in state:
            raise ValueError(
                f"{prefix}: not a bitsandbytes 4-bit weight; expected {prefix!r}, '{prefix}.absmax' and one "
                f"'{prefix}.{META}*' entry, got {sorted(key for key in state if key.startswith(prefix))}."
            )
        meta = read_meta(prefix, meta_keys[0], state[meta_keys[0]])
        numel = math.prod(meta["shape"])
        blocks = -(-numel // meta["blocksize"])
        nested_blocks = 0
        scale_dtype = torch.float32
        if "nested_offset" in meta:
            nested_blocks = -(-blocks // blockwise.NESTED_BLOCK_SIZE)
            scale_dtype = torch.uint8
        # bitsandbytes may store the same bytes with another dtype (its option quant_storage).
        packed = state[prefix]
        if packed.is_quantized or packed.layout is not torch.strided:  # `view` would read beyond the values
            raise ValueError(f"{prefix}: is a {packed.layout} tensor of {packed.dtype}, not the bytes of codes.")
        packed = packed.contiguous().view(torch.uint8).reshape(-1, 1)
        absmax = state[f"{prefix}.absmax"]
        nested_absmax = state.get(f"{prefix}.nested_absmax")
        check_values(prefix, packed, (numel + 1) // 2, torch.uint8)
        check_values(f"{prefix}.absmax", absmax, blocks, scale_dtype)
        check_values(f"{prefix}.nested_absmax", nested_absmax, nested_blocks, torch.float32)
        check_levels(f"{prefix}.quant_map", state, codebook(meta["quant_type"]).levels)
        check_levels(f"{prefix}.nested_quant_map", state, dynamic_map())
        if nested_absmax is not None:
            nested_absmax = nested_absmax.reshape(-1)
        return cls(
            packed=packed,
            absmax=absmax.reshape(-1),
            nested_absmax=nested_absmax,
            offset=meta.get("nested_offset", 0.0),
            shape=tuple(meta["shape"]),
            quant_type=meta["quant_type"],
            block_size=meta["blocksize"],
            dtype=getattr(torch, meta["dtype"]),
        )
