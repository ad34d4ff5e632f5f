"""Embeddings and output embeddings that are frozen in 4 bits, without an adapter: `quantize_embeddings`.

    embedding            y = W[tokens]              decodes the rows of these tokens alone
    output embedding     logits = x W^T + bias      decodes `PIECE` weights of W at a time

All layers of a tied weight hold the same bytes. Scales stay in fp32, as in bitsandbytes' Embedding4bit, so that no row
depends on another: new tokens, whose rows are random, do not change the bytes of the others.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.lora_linear import PLAIN, lora_linear
from lightning_qlora.layers.derived_class import Derived, derives
from lightning_qlora.layers.dtensor import is_sharded
from lightning_qlora.layers.fingerprint import has_values
from lightning_qlora.layers.packed_linear import BASE, PackedLayer, own_names, to_dense
from lightning_qlora.layers.qlora_linear import REPLACED, QLoRALinear, cast_input
from lightning_qlora.layers.readable_weight import READ_ONLY, readable_parameter
from lightning_qlora.quantization.packed_weight import PackedBytes, PackedWeight

PIECE = 1 << 26  # weights of an output embedding that are decoded at a time: 128 MiB in bf16, as a layer of an 8B model
SPLIT_EMBEDDING = (
    "an embedding in 4 bits (quantize_embeddings) can't be split by tensor parallelism. Leave it, and the output "
    "embedding, out of the plan, or use fully_shard."
)
NOT_TIED = (
    "differs from the weight that the config of the model ties it to. Set tie_word_embeddings=False in config.json, or "
    "leave out quantize_embeddings."
)


class FrozenLayer(Derived, PackedLayer):
    """What an embedding and an output embedding in 4 bits have in common.

    Attributes:
        config: The arguments of the conversion.
        dense_class: Class of the layer before conversion, and again after `merge`.
    """

    config: QLoRAConfig
    _qlora_disabled = 1  # as in a layer whose adapter is disabled

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W for code that reads it; `F.embedding` and `F.linear` with it decode what they need."""
        return readable_parameter(self)

    effective_weight = PackedLayer.decode  # what other code reads

    def lookup(self, tokens: Tensor) -> Tensor:
        """W[tokens], [..., dim], in the type of the float weight."""
        held, flat = self._parameters, tokens.reshape(-1)
        with PLAIN():
            packed, absmax = (F.embedding(flat, held[key]) for key in ("packed", "absmax"))  # type: ignore[arg-type]
        whole, shape = self.weight_bytes, (len(flat), self._shape[1])
        rows = PackedBytes(packed, absmax, whole.nested, shape, whole.quant_type, whole.block_size)
        return ops.dequantize(rows, self.weight_dtype).view(*tokens.shape, shape[1])

    def linear_by_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What `F.linear(x, layer.weight, bias)` computes, in the type that `QLoRALinear.compute_dtype` says."""
        dtype, pieces = QLoRALinear.compute_dtype(self, x), self.pieces()  # type: ignore[arg-type]
        of_pieces = [None] * len(pieces) if bias is None else torch.split(bias, [piece.shape[0] for piece in pieces])
        input, no_a = cast_input(x, dtype), x.new_empty(0, x.shape[-1])
        made = [
            lora_linear(input, piece, of_piece, no_a, x.new_empty(piece.shape[0], 0), 1.0)
            for piece, of_piece in zip(pieces, of_pieces, strict=True)
        ]
        y = made[0] if len(made) == 1 else torch.cat(made, -1)
        return y if y.dtype is x.dtype or ops.has_autocast(x.device.type) else y.to(x.dtype)

    def pieces(self) -> list[PackedBytes]:
        """W in rows of at most `PIECE` weights."""
        whole, (rows, columns) = self.weight_bytes, self._shape
        step = max(1, PIECE // columns)
        if step >= rows:
            return [whole]
        with PLAIN():
            pieces = zip(torch.split(whole.packed, step), torch.split(whole.absmax, step), strict=True)
        return [PackedBytes(p, a, whole.nested, (len(p), columns), *whole[4:]) for p, a in pieces]

    def quantize_weight(self, weight: Tensor) -> None:
        """Replace the weight by a float weight of the same shape."""
        self.set_packed_weight(quantize(weight.to(self.packed.device), self.config))

    def share(self, other: "FrozenLayer") -> None:
        """Hold the bytes of another layer."""
        own = own_names(other)
        self.__dict__.update({key: value for key, value in vars(other).items() if key in own})
        for key in BASE:
            self._parameters[key] = other._parameters[key]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in nn.Module; refuses a dense weight, and a part of one. The weight of another such layer is shared."""
        if is_sharded(param):
            raise ValueError(SPLIT_EMBEDDING)
        if name == "weight":
            source = getattr(param, "_source", None)
            if not isinstance(source, FrozenLayer):
                raise RuntimeError(f"weight = ...: {READ_ONLY}")
            self.share(source)
        else:
            super().register_parameter(name, param)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        dense = state_dict.pop(prefix + "weight", None)  # of a checkpoint of the dense module
        if dense is not None:
            if tuple(dense.shape) == self._shape:
                self.quantize_weight(dense.contiguous())
            else:
                error_msgs.append(f"{prefix}weight: has shape {list(dense.shape)}, and {list(self._shape)} here.")
            state_dict.update({prefix + key: getattr(self, key).detach() for key in BASE})
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class PackedEmbedding(FrozenLayer, nn.Embedding):  # type: ignore[override]
    """An embedding in 4 bits."""

    dense_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Tokens [...] -> [..., dim]."""
        return self.lookup(input)


class PackedHead(FrozenLayer, nn.Linear):  # type: ignore[override]
    """An output embedding in 4 bits."""

    dense_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Hidden states [..., dim] -> logits [..., vocabulary]."""
        return self.linear_by_weight(input, self.bias)


@derives
def frozen_class(dense_class: type[nn.Module]) -> type[nn.Module]:
    """The 4-bit class for nn.Embedding, nn.Linear or a subclass of one, whose forward stays."""
    kind = PackedEmbedding if issubclass(dense_class, nn.Embedding) else PackedHead
    if dense_class is kind.dense_class:
        return kind
    members = {"__module__": dense_class.__module__, "dense_class": dense_class}
    # In this order `super().forward` of the subclass is that of the 4-bit class.
    return type(f"Packed{dense_class.__name__}", (dense_class, kind), members)


def quantize(weight: Tensor, config: QLoRAConfig) -> PackedWeight:
    """The 4-bit weight of an embedding, without double quantization."""
    pack = ops.quantize if has_values(weight) else ops.quantize_unchecked
    return pack(weight.detach(), config.quant_type, config.block_size, double_quant=False)


def freeze_in_4_bits(layers: list[nn.Module], weight: PackedWeight, config: QLoRAConfig) -> None:
    """Let the layers of a tied weight hold it in 4 bits, in place."""
    made = list[FrozenLayer]()
    for layer in layers:
        setattr(layer._parameters.pop("weight"), REPLACED, layer)  # for an optimizer that was made before
        layer.__class__ = frozen_class(type(layer))
        assert isinstance(layer, FrozenLayer)
        layer.config = config
        made.append(layer)
    made[0].set_packed_weight(weight)
    for layer in made[1:]:
        layer.share(made[0])


def decode_embeddings(module: nn.Module) -> list[nn.Parameter]:
    """Make every embedding in 4 bits the dense layer that it was; returns the weights, each once."""
    weights: dict[int, nn.Parameter] = {}
    for layer in frozen_layers(module):
        key = id(layer.packed)
        if key not in weights:
            weights[key] = nn.Parameter(layer.decode())
        to_dense(layer, weights[key])
    return list(weights.values())


def frozen_layers(module: nn.Module) -> list[FrozenLayer]:
    """The embeddings and output embeddings in 4 bits."""
    return [layer for layer in module.modules() if isinstance(layer, FrozenLayer)]
