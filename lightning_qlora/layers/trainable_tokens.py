"""Embeddings of which only some rows train: PEFT's `trainable_token_indices`.

    embedding            y = E[tokens]             E: W with the rows `indices` replaced by delta [n, dim]; W is frozen
    output embedding     logits = x E^T + bias

A forward pass does not build E; PEFT copies W for it. It calls the class of the layer once with W and once with delta,
and combines the two results. So gradients and optimizer state have the size of delta. `layer.weight` is E for code that
reads it. Layers that share a tied weight share one delta. Its module has the name used in PEFT's files.
Source: peft/tuners/trainable_tokens/layer.py.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qlora.layers.derived import Derived, derive, original_class, restore
from lightning_qlora.layers.names import DELTA, TOKEN_ADAPTER
from lightning_qlora.layers.qlora_linear import ROWS
from lightning_qlora.layers.readable_weight import readable_parameter
from lightning_qlora.layers.with_adapter import WithAdapter
from lightning_qlora.tensors.dtensor import gather, is_sharded, shard_like

SPLIT_TOKENS = (
    "trainable_token_indices: an embedding with rows that train can't be split over ranks. In configure_model, call "
    "self.trainer.precision_plugin.convert_module(self.model) before fully_shard, which splits it then. Leave it, and "
    "the output embedding that is tied to it, out of the plan of parallelize_module. A DistributedConfig splits it: "
    "load the model without one, and call parallelize_module or fully_shard."
)


class TokenAdapter(WithAdapter):
    trainable_tokens_delta: nn.Parameter  # [n, dim], fp32 (fp64 if the weight is fp64); cast to the weight's type
    token_indices: Tensor  # [n], which row of the weight each row of the delta replaces
    order: Tensor  # [n], token_indices.argsort()

    def __init__(self, weight: Tensor, indices: list[int]) -> None:
        super().__init__()
        index = torch.tensor(indices, device=weight.device)
        with torch.no_grad():
            rows = F.embedding(index, weight)
        self.trainable_tokens_delta = nn.Parameter(rows.to(torch.promote_types(rows.dtype, torch.float32)))
        self.register_buffer("token_indices", index, persistent=False)
        self.register_buffer("order", index.argsort(), persistent=False)

    def adapter_parameters(self) -> list[nn.Parameter]:
        return [self.trainable_tokens_delta]

    def trains_instead(self) -> dict[str, nn.Parameter]:
        return {DELTA: self.trainable_tokens_delta}

    @property
    def row_count(self) -> int:  # type: ignore[override]
        return len(self.token_indices)

    def rows_that_train(self) -> list[int]:
        return self.token_indices.tolist()

    def _layers(self, modules: Iterable[nn.Module]) -> list[Any]:
        kinds = (part for part in modules if isinstance(part, TrainableTokens))
        return [part for part in kinds if part.token_adapter is self]

    def reset_rows(self, modules: Iterable[nn.Module]) -> None:
        delta = self.trainable_tokens_delta
        weight = gather(self._layers(modules)[0].base().weight.detach())
        with torch.no_grad():
            delta.copy_(shard_like(weight[self.token_indices].to(delta.dtype), delta))

    def end(self, modules: Iterable[nn.Module]) -> None:
        """Write the rows into the weight of each layer that has them."""
        layers = self._layers(modules)
        rows = [layer.rows().detach() for layer in layers]
        for layer in layers:
            vars(layer._parameters.get("weight", layer)).pop(ROWS, None)
            restore(layer, TrainableTokens)
            del layer._modules[TOKEN_ADAPTER]
        with torch.no_grad():
            for layer, values in zip(layers, rows, strict=True):
                layer.weight[self.token_indices] = values

    def reported_name(self, name: str) -> str:
        """That of the embedding; for tied weights of the first one."""
        return name.removesuffix(TOKEN_ADAPTER)[:-1]


class TrainableTokens(Derived):
    """What `train_tokens` adds to the class of an embedding or output embedding."""

    is_decided = True
    token_adapter: TokenAdapter  # shared by the layers of a tied weight
    _parameters: dict[str, Any]

    @classmethod
    def _derived_bases(cls, before: type[Any]) -> tuple[type, ...]:
        kind = TrainableTokensEmbedding if issubclass(before, nn.Embedding) else TrainableTokensLinear
        return kind, before

    @classmethod
    def _derived_members(cls, before: type[Any]) -> dict[str, Any]:
        return {"__name__": f"TrainableTokens{before.__name__}"}

    @property
    def weight(self) -> Tensor:
        """E, read-only; see `readable_weight.py`. If the weight is sharded, W alone, because FSDP2 reads it."""
        weight: Tensor = self.base().weight
        if is_sharded(weight):
            return weight
        return readable_parameter(self)

    def weight_metadata(self) -> tuple[Any, torch.dtype, torch.device]:
        weight = self.base().weight
        return weight.shape, weight.dtype, weight.device

    def register_parameter(self, name: str, param: Any) -> None:
        """As in nn.Module. If `param` is the `weight` of another such layer, its parameter is shared (tied weights)."""
        source = getattr(param, "_source", None)
        if isinstance(source, TrainableTokens):
            param = source._parameters.get(name, param)
        super().register_parameter(name, param)  # type: ignore[misc]

    def frozen_values(self, parameter: Tensor) -> Tensor:
        """With zeros in the rows that train: W has values there that are not used, random for new tokens."""
        if parameter.ndim < 2 or not len(parameter):
            return parameter
        return gather(parameter.detach()).index_fill(0, self.token_adapter.token_indices, 0)

    def split_over(self, mesh: Any, by_inputs: bool) -> None:
        raise ValueError(SPLIT_TOKENS)

    def complete_dense_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """The rows that train begin with the values there."""
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None:
            state_dict.setdefault(prefix + DELTA, weight[self.token_adapter.token_indices])

    @property
    def _qlora_disabled(self) -> int:
        return self.token_adapter._qlora_disabled

    def adapter_parameters(self) -> list[nn.Parameter]:
        return self.token_adapter.adapter_parameters()

    def base(self) -> Any:
        """This layer with its dense class: it computes with W alone."""
        return self._view(self.classes_before[TrainableTokens])

    def _view(self, kind: Any, **changed: Any) -> Any:
        view = object.__new__(kind)
        view.__dict__.update(self.__dict__, **changed)
        view.__dict__.pop("forward", None)  # what stands in place of it calls this layer
        return view

    def rows(self) -> Tensor:
        return self.token_adapter.trainable_tokens_delta.to(self.base().weight.dtype)

    def _call_with_rows(self, input: Tensor, others: dict[str, Any], **changed: Any) -> Tensor:
        """Call `forward` of the dense class with delta as the weight; a class may scale its result, for example."""
        dense: Any = original_class(type(self))
        view = self._view(dense, _parameters={"weight": self.rows(), **others}, **changed)
        return dense.forward(view, input)  # type: ignore[no-any-return]

    def effective_weight(self) -> Tensor:
        weight: Tensor = self.base().weight
        if self._qlora_disabled:
            return weight
        return weight.index_copy(0, self.token_adapter.token_indices, self.rows())

    def linear_by_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, self.base().weight, bias)
        if self._qlora_disabled:
            return y
        indices = self.token_adapter.token_indices
        if bias is not None:
            bias = bias[indices]
        return y.index_copy(-1, indices, F.linear(x, self.rows(), bias))


class TrainableTokensEmbedding(TrainableTokens, nn.Embedding):  # type: ignore[override]
    def forward(self, input: Tensor) -> Tensor:
        """Tokens [...] -> [..., dim]."""
        output: Tensor = self.base().forward(input)
        if self._qlora_disabled:
            return output
        indices = self.token_adapter.token_indices
        order = self.token_adapter.order
        row = order[torch.searchsorted(indices, input, sorter=order).clamp_max_(len(order) - 1)]
        # `row` is arbitrary for a token that does not train: torch.where below does not use its result.
        rows = self._call_with_rows(row, {}, num_embeddings=len(order), padding_idx=None)
        trains = indices[row] == input
        if self.padding_idx is not None:  # torch gives this row no gradient
            rows = torch.where((input == self.padding_idx).unsqueeze(-1), rows.detach(), rows)
        return torch.where(trains.unsqueeze(-1), rows, output)


class TrainableTokensLinear(TrainableTokens, nn.Linear):  # type: ignore[override]
    def forward(self, input: Tensor) -> Tensor:
        """Hidden states [..., dim] -> logits [..., vocabulary]."""
        logits: Tensor = self.base().forward(input)
        if self._qlora_disabled:
            return logits
        indices = self.token_adapter.token_indices
        bias: Tensor | None = self.bias
        if bias is not None:
            bias = bias[indices]
        return logits.index_copy_(-1, indices, self._call_with_rows(input, {"bias": bias}, out_features=len(indices)))


def train_tokens(layers: Sequence[Any], indices: list[int]) -> None:
    """Let rows of a weight train in all layers that share it, in place. They start with the values of the weight.

    Raises:
        ValueError: If the weight is sharded.
    """
    weight = layers[0].weight
    if is_sharded(weight):
        raise ValueError(SPLIT_TOKENS)
    adapter = TokenAdapter(weight, indices)
    setattr(weight, ROWS, adapter)
    for layer in layers:
        derive(TrainableTokens, layer)
        layer.register_module(TOKEN_ADAPTER, adapter)
