"""PackedLayer: a layer whose weight is held in 4 bits, as frozen parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.config import QuantType
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.lora_linear import PLAIN
from lightning_qlora.layers.dtensor import gather, is_sharded, shard_like
from lightning_qlora.layers.fingerprint import fingerprint
from lightning_qlora.layers.kinds import kind_of
from lightning_qlora.layers.packed_parameter import PackedParameter
from lightning_qlora.quantization.packed_weight import PackedBytes, PackedWeight

BASE = ("packed", "absmax", "nested")  # the parameters that hold the frozen weight


class PackedLayer(nn.Module):
    """Stores a 4-bit weight [out, in] in frozen uint8 parameters."""

    weight: Tensor  # for code that reads it
    packed: nn.Parameter  # the three parts of `PackedBytes`, [n, 1] or with one row an output
    absmax: nn.Parameter
    nested: nn.Parameter
    quant_type: QuantType
    block_size: int
    weight_dtype: torch.dtype  # of the float weight, which it decodes to
    dense_class: type[nn.Module]  # of the layer before conversion, and again after `merge`
    _shape: tuple[int, int]
    _transposed = False  # whether the dense layer stores its weight as [in, out]
    _fingerprint: int | None  # computed at the first use
    _base_squares: Tensor | None  # DoRA: sums of squares of the rows, computed at the first use
    _split: Any = None  # with tensor parallelism: a `tensor_parallel.Split`

    def set_packed_weight(self, weight: PackedWeight) -> None:
        """Replace the 4-bit weight; the bytes are stored as they are."""
        stored = weight.to_bytes()
        self._shape, self.quant_type, self.block_size = stored.shape, stored.quant_type, stored.block_size
        self.weight_dtype, self._fingerprint, self._base_squares = weight.dtype, None, None
        for name in BASE:
            data: Tensor = getattr(stored, name).reshape(-1, 1)
            # One row per output where rows are whole bytes, so that a sharded dimension 0 splits outputs. Two
            # dimensions in any case: code that casts the norms of a model casts parameters of one dimension.
            if name != "nested" and data.numel() % stored.shape[0] == 0 and stored.shape[1] % stored.block_size == 0:
                data = data.view(stored.shape[0], -1)
            held = self._parameters.get(name)
            if held is None:
                self.register_parameter(name, PackedParameter(data, requires_grad=False))
            elif is_sharded(held):
                held.data.copy_(shard_like(data, held))
            else:
                held.data = data  # an optimizer or a strategy keeps the same parameter

    @property
    def weight_bytes(self) -> PackedBytes:
        """The 4-bit weight in the form that the ops take."""
        held: dict[str, Any] = self._parameters  # `self.packed` would cost a search through the module
        packed, absmax, nested = held["packed"], held["absmax"], held["nested"]
        return PackedBytes(packed, absmax, nested, self._shape, self.quant_type, self.block_size)

    def weight_metadata(self) -> tuple[tuple[int, int], torch.dtype, torch.device]:
        """Shape [out, in], type and device of the weight that it decodes to."""
        return self._shape, self.weight_dtype, self._parameters["packed"].device  # type: ignore[union-attr]

    @property
    def whole_bytes(self) -> PackedBytes:
        """The same; of a sharded layer it is gathered, so all ranks must read it together."""
        with PLAIN():
            packed, absmax, nested = (gather(getattr(self, name).data) for name in BASE)
        # Not `_replace`, which torch.compile of torch 2.8 does not trace.
        return PackedBytes(packed, absmax, nested, self._shape, self.quant_type, self.block_size)

    @property
    def packed_weight(self) -> PackedWeight:
        """The 4-bit weight, [out, in]; of a sharded layer it is gathered too."""
        return PackedWeight.from_bytes(self.whole_bytes, self.weight_dtype)

    def decode(self) -> Tensor:
        """The base weight in its original type and shape."""
        return self._as_stored(ops.dequantize(self.whole_bytes, self.weight_dtype))

    def _as_stored(self, weight: Tensor) -> Tensor:
        """A weight [out, in] in the shape that the dense layer has, or the reverse."""
        return weight.T if self._transposed else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLayer":
        def keep_bytes(tensor: Tensor) -> Tensor:
            """`module.type(dtype)` casts integers too, which would destroy the bytes: they only change device."""
            applied = fn(tensor)
            return applied if tensor.is_floating_point() or applied.dtype is tensor.dtype else tensor.to(applied.device)

        super()._apply(keep_bytes, recurse)  # type: ignore[no-untyped-call]
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.packed.device)).dtype
        return self

    def reset_parameters(self) -> None:
        """Raise RuntimeError: Lightning calls this for a module that is on the meta device after it was sharded."""
        raise RuntimeError(
            "A 4-bit layer can't be initialized anew: its weight is that of a pretrained model. Load a module that was "
            "sharded on the meta device with lightning_qlora.load_weights(module, FOLDER), after fully_shard."
        )

    def base_fingerprint(self) -> int:
        """Fingerprint of the 4-bit weight, computed at the first use."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.packed, self.absmax, self.nested)
        return self._fingerprint


def own_names(layer: PackedLayer) -> set[str]:
    """Names of the parameters and attributes that a layer has while it is in 4 bits."""
    return {name for kind in type(layer).__mro__ if issubclass(kind, PackedLayer) for name in kind.__annotations__}


def to_dense(layer: PackedLayer, weight: nn.Parameter) -> None:
    """Make a layer the dense layer it was, with this weight, in place; hooks and the user's attributes stay."""
    own, dense_class = own_names(layer), layer.dense_class
    kept = {key: value for key, value in layer._parameters.items() if key not in own}
    for name in (own | {"in_features", "out_features"} - {*kind_of(dense_class).sizes}) & layer.__dict__.keys():
        del layer.__dict__[name]
    layer._parameters.clear()
    layer.__class__ = dense_class  # type: ignore[assignment]
    layer.register_parameter("weight", weight)
    layer._parameters.update(kept)  # the bias, and parameters that a subclass of nn.Linear added
