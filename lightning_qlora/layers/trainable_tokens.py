"""Embeddings of which only some rows train: PEFT's `trainable_token_indices`.

    embedding            y = E[tokens]             E: W with the rows `indices` replaced by delta [n, dim]; W is frozen
    output embedding     logits = x E^T + bias

A call does not make E (PEFT copies W in each call): the class of the layer is called with W and again with delta, and
its results are put together, so gradients and optimizer state are as large as delta. `layer.weight` is E for code that
reads it. All layers of a tied weight have one delta, in a module of the name that PEFT's files use.
Source: peft/tuners/trainable_tokens/layer.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qlora.layers.derived_class import Derived, derives
from lightning_qlora.layers.dotted_names import plain_name
from lightning_qlora.layers.dtensor import gather, is_sharded
from lightning_qlora.layers.readable_weight import readable_parameter

TOKEN_ADAPTER = "token_adapter"
DELTA = f"{TOKEN_ADAPTER}.trainable_tokens_delta"
ROWS = "_qlora_rows"  # attribute of a weight: its delta, for an optimizer that was made before
SPLIT_TOKENS = (
    "trainable_token_indices: an embedding with rows that train can't be split over ranks. In configure_model, call "
    "self.trainer.precision_plugin.convert_module(self.model) before fully_shard, which splits it then. Leave it, and "
    "the output embedding that is tied to it, out of the plan of parallelize_module. A DistributedConfig splits it: "
    "load the model without one, and call parallelize_module or fully_shard."
)


class TokenAdapter(nn.Module):
    """The rows of an embedding that train."""

    trainable_tokens_delta: nn.Parameter  # [n, dim], fp32 or the type of a larger weight; computed in the weight's type
    token_indices: Tensor  # [n], the row of the weight that each row of the delta stands for
    order: Tensor  # [n], that of the sorted indices
    _qlora_disabled: int = 0

    def __init__(self, weight: Tensor, indices: list[int]) -> None:
        super().__init__()
        index = torch.tensor(indices, device=weight.device)
        with torch.no_grad():
            rows = F.embedding(index, weight)
        self.trainable_tokens_delta = nn.Parameter(rows.to(torch.promote_types(rows.dtype, torch.float32), copy=True))
        self.register_buffer("token_indices", index, persistent=False)
        self.register_buffer("order", index.argsort(), persistent=False)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return [self.trainable_tokens_delta]


class TrainableTokens(Derived):
    """What `train_tokens` adds to the class of an embedding or output embedding."""

    token_adapter: TokenAdapter  # the rows that train; layers of a tied weight have the same
    dense_class: type[nn.Module]  # of the layer before conversion, and again after `merge`
    _parameters: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        """E for code that reads it, read-only; see `readable_weight.py`. Of shards, which FSDP2 reads, W alone."""
        weight: Tensor = self.base().weight
        return weight if is_sharded(weight) else readable_parameter(self)

    def weight_metadata(self) -> tuple[Any, torch.dtype, torch.device]:
        """Shape, type and device of the weight."""
        weight = self.base().weight
        return weight.shape, weight.dtype, weight.device

    def register_parameter(self, name: str, param: Any) -> None:
        """As in nn.Module; the weight of another such layer is shared."""
        source = getattr(param, "_source", None)
        shared = source._parameters.get(name, param) if isinstance(source, TrainableTokens) else param
        super().register_parameter(name, shared)  # type: ignore[misc]

    @property
    def _qlora_disabled(self) -> int:
        return self.token_adapter._qlora_disabled

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The rows that train."""
        return self.token_adapter.adapter_parameters()

    def base(self) -> Any:
        """The layer without rows that train."""
        view = object.__new__(self.dense_class)
        view.__dict__.update(self.__dict__)
        return view

    def rows(self) -> Tensor:
        """The rows that train, in the type of the weight."""
        return self.token_adapter.trainable_tokens_delta.to(self.base().weight.dtype)

    def _call_with_rows(self, input: Tensor, others: dict[str, Any], **changed: Any) -> Tensor:
        """What the layer computes with the rows in place of its weight, also where its class scales the result."""
        dense: Any = getattr(self.dense_class, "dense_class", self.dense_class)
        view: Any = object.__new__(dense)
        view.__dict__.update(self.__dict__, _parameters={"weight": self.rows(), **others}, **changed)
        return dense.forward(view, input)  # type: ignore[no-any-return]

    def effective_weight(self) -> Tensor:
        """E."""
        weight: Tensor = self.base().weight
        return weight if self._qlora_disabled else weight.index_copy(0, self.token_adapter.token_indices, self.rows())

    def linear_by_weight(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What `F.linear(x, layer.weight, bias)` computes."""
        y, indices = F.linear(x, self.base().weight, bias), self.token_adapter.token_indices
        if self._qlora_disabled:
            return y
        return y.index_copy(-1, indices, F.linear(x, self.rows(), bias if bias is None else bias[indices]))


class TrainableTokensEmbedding(TrainableTokens, nn.Embedding):  # type: ignore[override]
    """An embedding with rows that train."""

    dense_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Tokens [...] -> [..., dim]."""
        output: Tensor = self.base().forward(input)
        if self._qlora_disabled:
            return output
        indices, order = self.token_adapter.token_indices, self.token_adapter.order
        row = order[torch.searchsorted(indices, input, sorter=order).clamp_max_(len(order) - 1)]
        # The row of another token is any: its result is not used.
        rows = self._call_with_rows(row, {}, num_embeddings=len(order), padding_idx=None)
        trains = indices[row] == input
        if self.padding_idx is not None:  # torch gives this row no gradient
            rows = torch.where((input == self.padding_idx).unsqueeze(-1), rows.detach(), rows)
        return torch.where(trains.unsqueeze(-1), rows, output)


class TrainableTokensLinear(TrainableTokens, nn.Linear):  # type: ignore[override]
    """An output embedding with rows that train."""

    dense_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Hidden states [..., dim] -> logits [..., vocabulary]."""
        logits: Tensor = self.base().forward(input)
        if self._qlora_disabled:
            return logits
        indices = self.token_adapter.token_indices
        bias = self.bias if self.bias is None else self.bias[indices]
        return logits.index_copy_(-1, indices, self._call_with_rows(input, {"bias": bias}, out_features=len(indices)))


@derives
def class_for(dense_class: type[nn.Module]) -> type[nn.Module]:
    """The class with rows that train for nn.Embedding, nn.Linear or a subclass of one of them."""
    kind = TrainableTokensEmbedding if issubclass(dense_class, nn.Embedding) else TrainableTokensLinear
    if dense_class in kind.__bases__:
        return kind
    members = {"__module__": dense_class.__module__, "dense_class": dense_class}
    return type(f"TrainableTokens{dense_class.__name__}", (kind, dense_class), members)


def train_tokens(layers: Sequence[Any], indices: list[int]) -> None:
    """Let these rows of a weight train, in place, in all layers that have it; they begin with its values.

    Raises:
        ValueError: If ranks hold parts of the weight.
    """
    weight = layers[0].weight
    if is_sharded(weight):
        raise ValueError(SPLIT_TOKENS)
    adapter = TokenAdapter(weight, indices)
    setattr(weight, ROWS, adapter.trainable_tokens_delta)
    for layer in layers:
        layer.__class__ = class_for(type(layer))
        layer.register_module(TOKEN_ADAPTER, adapter)


def token_adapters(module: nn.Module) -> dict[str, TokenAdapter]:
    """Name of each embedding with rows that train -> these; of layers with a tied weight the first name."""
    parts = module.named_modules()
    return {name.removesuffix(TOKEN_ADAPTER)[:-1]: part for name, part in parts if isinstance(part, TokenAdapter)}


def token_indices(module: nn.Module) -> dict[str, list[int]]:
    """The same names without those of wrappers -> the indices."""
    return {plain_name(name): adapter.token_indices.tolist() for name, adapter in token_adapters(module).items()}


def merge_tokens(module: nn.Module) -> None:
    """Write the rows that train into the weights, and make each embedding what it was."""
    layers = [part for part in module.modules() if isinstance(part, TrainableTokens)]
    rows = [(layer.token_adapter.token_indices, layer.rows().detach()) for layer in layers]
    for layer in layers:
        remove_tokens(layer)
    with torch.no_grad():
        for layer, (indices, values) in zip(layers, rows, strict=True):
            layer.weight[indices] = values


def remove_tokens(layer: Any) -> None:
    """Make an embedding what it was without rows that train, in place."""
    vars(layer._parameters.get("weight", layer)).pop(ROWS, None)
    layer.__class__ = layer.dense_class
    del layer._modules[TOKEN_ADAPTER]


def without_tokens(owner: nn.Module, parameter: Tensor) -> Tensor:
    """A parameter; a weight with zeros for the rows that train: what stood there is not used, as in new tokens."""
    if not isinstance(owner, TrainableTokens) or parameter.ndim < 2 or not len(parameter):
        return parameter
    return gather(parameter.detach()).index_fill(0, owner.token_adapter.token_indices, 0)
