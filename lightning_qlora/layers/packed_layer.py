"""PackedLayer: a layer whose weight is held in 4 bits.

The bytes are attributes of the layer, neither parameters nor buffers. Code that loops over `parameters()` or
`buffers()` calculates with what it finds (casts, averages, penalties, vectors, `requires_grad_`), and nobody can
calculate with bytes; and DDP sends buffers in every step. Where a strategy splits the bytes over ranks, they are
parameters (`to_parameters`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.config import QuantType
from lightning_qlora.kernels import ops
from lightning_qlora.quantization.packed_weight import PackedBytes, PackedWeight
from lightning_qlora.tensors.dtensor import gather, is_sharded, shard_like
from lightning_qlora.tensors.fingerprint import fingerprint

BASE = ("packed", "absmax", "nested")  # the tensors that hold the frozen weight
ADAPTER_ARGUMENTS = "adapter_arguments"  # key of those of the adapter in a state dict with a base


class PackedLayer(nn.Module):
    """Stores a 4-bit weight [out, in], or a stack of them [experts, out, in], in uint8 tensors."""

    weight: Tensor  # for code that reads it
    packed: Tensor  # the three parts of `PackedBytes`: [n, 1] or with one row an output; of a stack one row an expert
    absmax: Tensor
    nested: Tensor
    quant_type: QuantType
    block_size: int
    weight_dtype: torch.dtype  # which it decodes to: that of the float weight; fp32 where the layer is held in fp32
    dtype_before: torch.dtype  # of the float weight
    _shape: tuple[int, ...]
    _transposed = False  # whether the dense layer stores its weight as [in, out]
    _fingerprint: int | None  # computed at the first use
    base_of_conversion: int | None = None  # fingerprint of the base that conversion made, if it was replaced since
    _base_squares: dict[int, Tensor]  # DoRA: number of a matrix -> sums of squares of its rows, from their first use
    _prepared: Any = None  # from the first call on: a `prepared_call.PreparedCall`

    @property
    def is_held(self) -> bool:
        return self.weight_dtype is not self.dtype_before

    def set_packed_weights(self, weights: Sequence[PackedWeight]) -> None:
        self.set_matrices([weight.to_bytes() for weight in weights], weights[0].dtype)

    def set_matrices(self, matrices: Sequence[PackedBytes], dtype: torch.dtype) -> None:
        self.set_bytes(in_rows(*matrices), dtype)

    def set_bytes(self, stored: PackedBytes, dtype: torch.dtype) -> None:
        """Replace the three tensors, whole or split as those of the layer are; the weight decodes to `dtype`."""
        self._shape = stored.shape
        self.quant_type = stored.quant_type
        self.block_size = stored.block_size
        if "weight_dtype" not in vars(self) or not self.is_held:
            self.weight_dtype = dtype
        self.dtype_before = dtype
        self._fingerprint = None
        self._base_squares = {}
        self.__dict__.pop("_prepared", None)
        for name in BASE:
            data: Tensor = getattr(stored, name)
            parameter = self._parameters.get(name)
            if parameter is None:
                self.__dict__[name] = data
            elif is_sharded(parameter):
                parameter.data.copy_(shard_like(data, parameter))
            else:
                parameter.data = data  # an optimizer or a strategy keeps the same parameter

    @property
    def matrix_count(self) -> int:
        return 1

    @property
    def weight_bytes(self) -> PackedBytes:
        return PackedBytes(self.packed, self.absmax, self.nested, self._shape, self.quant_type, self.block_size)

    def weight_metadata(self) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
        return self._shape, self.weight_dtype, self.packed.device

    @property
    def whole_bytes(self) -> PackedBytes:
        """The 4-bit weight; of a sharded layer it is gathered, so all ranks must read it together."""
        packed, absmax, nested = (gather(getattr(self, name).detach()) for name in BASE)
        return PackedBytes(packed, absmax, nested, self._shape, self.quant_type, self.block_size)

    @property
    def packed_weights(self) -> list[PackedWeight]:
        """The 4-bit weight of each matrix, [out, in]; of a sharded layer they are gathered too."""
        return [PackedWeight.from_bytes(weight, self.dtype_before) for weight in self.whole_bytes.unbind()]

    @property
    def packed_weight(self) -> PackedWeight:
        """The 4-bit weight of a layer with one matrix."""
        (weight,) = self.packed_weights
        return weight

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Of one dense matrix."""
        rows, columns = self._shape[-2:]
        return (columns, rows) if self._transposed else (rows, columns)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        return *self._shape[:-2], *self.matrix_shape

    def decode(self) -> Tensor:
        """The base weight in its original type and shape."""
        matrices = [ops.dequantize(weight, self.weight_dtype) for weight in self.whole_bytes.unbind()]
        return self.as_dense(matrices)

    def as_dense(self, matrices: Sequence[Tensor]) -> Tensor:
        return self._as_stored(self.join_matrices(matrices))

    def join_matrices(self, matrices: Sequence[Tensor]) -> Tensor:
        """The values of the one matrix; of a stack, those of its matrices in one tensor."""
        (matrix,) = matrices
        return matrix

    def split_matrices(self, values: Any) -> Sequence[Tensor]:
        """The reverse, also of values in the shape of the dense weight, or that are split already."""
        matrices: Sequence[Tensor] = [values] if isinstance(values, Tensor) else values
        return matrices

    def _as_stored(self, weight: Tensor) -> Tensor:
        return weight.mT if self._transposed else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLayer":
        def keep_bytes(tensor: Tensor) -> Tensor:
            """`module.type(dtype)` casts integers too, which would destroy the bytes: they only change device."""
            applied = fn(tensor)
            if tensor.is_floating_point() or applied.dtype is tensor.dtype:
                return applied
            return tensor.to(applied.device)

        self.__dict__.pop("_prepared", None)  # it would keep the memory of another device
        super()._apply(keep_bytes, recurse)  # type: ignore[no-untyped-call]
        for name in self.__dict__.keys() & BASE:
            self.__dict__[name] = keep_bytes(self.__dict__[name])
        self._fingerprint = None  # `to_empty` leaves no values
        for name in ("weight_dtype", "dtype_before"):  # as a float weight would be cast
            vars(self)[name] = fn(torch.empty(0, dtype=getattr(self, name), device="cpu")).dtype
        return self

    def reset_parameters(self) -> None:
        """Raise RuntimeError: Lightning calls this for a module that is on the meta device after it was sharded."""
        raise RuntimeError(
            "A 4-bit layer can't be initialized anew: its weight is that of a pretrained model. Load a module that was "
            "sharded on the meta device with lightning_qlora.load_weights(module, FOLDER), after fully_shard."
        )

    def _fqn_modifiers(self) -> dict[str, str]:
        """Where torch.distributed.checkpoint, which follows keys as attributes, finds the entries of the weight."""
        return {"weight": "_keys", ADAPTER_ARGUMENTS: "_keys"}

    @property
    def _keys(self) -> "_Keys":
        return _Keys()

    def base_fingerprint(self) -> int:
        """Fingerprint of the 4-bit weight, computed at the first use; 0 while it has no values."""
        if not self._fingerprint:
            self._fingerprint = fingerprint(self.packed, self.absmax, self.nested)
        return self._fingerprint

    def remember_base(self) -> None:
        """Call this before the base is replaced by another one: a state dict holds the other one then."""
        if self.base_of_conversion is None:
            self.base_of_conversion = self.base_fingerprint()

    def has_base_of_conversion(self) -> bool:
        """Whether converting a new build of the module gives the base that this layer has."""
        return self.base_of_conversion is None or self.base_of_conversion == self.base_fingerprint()


class _Keys:
    """Has any attribute, such as `weight.absmax`."""

    def __getattr__(self, name: str) -> "_Keys":
        if name.startswith("_"):
            raise AttributeError(name)
        return self


def in_rows(weight: PackedBytes) -> PackedBytes:
    """One row per output where rows are whole bytes, so that a sharded dimension 0 splits outputs; else [n, 1]."""
    packed, absmax, nested = (tensor.reshape(-1, 1) for tensor in weight[:3])
    if weight.shape[1] % weight.block_size == 0:
        packed, absmax = (tensor.view(weight.shape[0], -1) for tensor in (packed, absmax))
    return weight._replace(packed=packed, absmax=absmax, nested=nested)


def to_parameters(module: nn.Module) -> None:
    """Hold the bytes of all 4-bit layers of a module in frozen uint8 parameters, which `fully_shard` splits over ranks.

    Only a loop of your own calls it, before `fully_shard`; the Trainer and Fabric do it. Without it each rank holds
    all of the bytes.

    Args:
        module: A converted module; its 4-bit layers keep their names.

    Example:
        ```python
        import torch
        from lightning_qlora import convert, to_parameters
        from torch import nn

        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        convert(model, r=4)
        to_parameters(model)  # then fully_shard(model)
        print([name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8])
        ```
    """
    for layer in module.modules():
        if isinstance(layer, PackedLayer):
            layer.__dict__.pop("_prepared", None)  # it would keep the whole bytes
            for name in BASE:
                if name in layer.__dict__:
                    # The parameter first: the attribute hides it until it is removed, and no interrupt loses the bytes.
                    layer._parameters[name] = nn.Parameter(layer.__dict__[name], requires_grad=False)
                    del layer.__dict__[name]
