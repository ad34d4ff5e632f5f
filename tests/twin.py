"""The dense twin of a converted module: the same module in plain torch, whose weights are the decoded W + s B A.

    twin = dense_twin(converted, plain)     # `plain`: an equal module that was not converted

Every 4-bit weight becomes the decoded one with a parametrization of torch (`Adapted`), whose parameters are A and B,
with DoRA the magnitudes; an embedding of which some tokens train has one with their rows (`WithRows`). What is done to
both must have the same result. A twin of a module in 16 bits is in fp32: it has the values of the 16 bits, and none of
their rounding.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from lightning_qlora.experts.experts import QLoRAExperts
from lightning_qlora.kernels.reference import dropout
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.layers.trainable_tokens import DELTA, TrainableTokens

ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")


class Adapted(nn.Module):
    """W -> W + s B A, with DoRA m (W + s B A) / ||W + s B A||, where the norm has no gradient."""

    def __init__(self, layer):
        super().__init__()
        for name in ADAPTER:
            value = getattr(layer, name, None)
            self.register_parameter(name, None if value is None else nn.Parameter(value.detach().clone()))
            if value is not None:
                getattr(self, name).requires_grad_(value.requires_grad)
        self.scaling, self.p, self.transposed = layer.scaling, layer.lora_dropout, layer._transposed
        self.enabled = True

    def forward(self, weight):
        if not self.enabled:
            return weight
        delta = self.scaling * (self.lora_B @ self.lora_A)
        total = weight + (delta.mT if self.transposed else delta)
        if self.lora_magnitude_vector is not None:
            inputs = 0 if self.transposed else 1
            norm = total.detach().norm(dim=inputs)
            total = (self.lora_magnitude_vector / norm).unsqueeze(inputs) * total
        return total


class WithRows(nn.Module):
    """W -> W with the rows of the tokens that train."""

    def __init__(self, adapter):
        super().__init__()
        self.rows = nn.Parameter(adapter.trainable_tokens_delta.detach().clone())
        self.indices = adapter.token_indices.tolist()
        self.enabled = True

    def forward(self, weight):
        return weight.index_put((torch.tensor(self.indices),), self.rows) if self.enabled else weight


def _with_dropout(layer, x):
    """The forward pass of an nn.Linear whose adapter has dropout: the mask acts on the adapter's input alone."""
    adapted = layer.parametrizations.weight[0]
    if not (adapted.enabled and layer.training):
        return F.linear(x, layer.weight, layer.bias)
    seed = torch.randint(1 << 62, (1,))
    dropped = dropout(x, adapted.p, seed)
    product = adapted.scaling * (dropped @ adapted.lora_A.T @ adapted.lora_B.T)
    return F.linear(x, layer.parametrizations.weight.original, layer.bias) + product


def dense_twin(converted, plain):
    """The dense twin of a converted module, made of `plain`, an equal module that was not converted; in place."""
    plain.float()
    for name, layer in adapted_layers(converted).items():
        path, _, key = name.rpartition(".")
        owner = plain.get_submodule(path) if isinstance(layer, QLoRAExperts) else plain.get_submodule(name)
        key = key if isinstance(layer, QLoRAExperts) else "weight"
        weight = layer.decode().float()
        setattr(owner, key, nn.Parameter(weight, requires_grad=False))
        parametrize.register_parametrization(owner, key, Adapted(layer), unsafe=True)
        if layer.lora_dropout:
            owner.forward = MethodType(_with_dropout, owner)
    for name, part in converted.named_modules():
        if isinstance(part, TrainableTokens):
            rows = WithRows(part.token_adapter)
            parametrize.register_parametrization(plain.get_submodule(name), "weight", rows)
    for ours, dense in matched(converted, plain).values():
        dense.requires_grad_(ours.requires_grad)
    return plain


def adapters_of(twin):
    return [part for part in twin.modules() if isinstance(part, (Adapted, WithRows))]


def matched(converted, twin):
    """Name in the converted module -> its parameter and that of the twin, each once: adapters, and what is dense."""
    layers = adapted_layers(converted)
    pairs = {}
    seen = set()
    for name, layer in layers.items():
        path, _, key = name.rpartition(".")
        owner = twin.get_submodule(path) if isinstance(layer, QLoRAExperts) else twin.get_submodule(name)
        adapted = owner.parametrizations[key if isinstance(layer, QLoRAExperts) else "weight"][0]
        for part in ADAPTER:
            ours = getattr(layer, part, None)
            if ours is not None:
                pairs[f"{name}.{part}"] = ours, getattr(adapted, part)
                seen.add(id(ours))
    others = dict(twin.named_parameters(remove_duplicate=False))  # also what the user parametrized
    for name, parameter in [*others.items()]:
        name = name.replace("parametrizations.weight.original", "weight")
        others[name.replace("parametrizations.weight.0.rows", DELTA)] = parameter
    for name, ours in converted.named_parameters():
        if id(ours) not in seen:
            pairs[name] = ours, others[name]
    return pairs


def error(ours, dense, scale=None):
    """||ours - dense|| by ||scale||, or by ||dense||."""
    assert ours.shape == dense.shape, (ours.shape, dense.shape)
    dense = dense.detach().double()
    norm = (dense if scale is None else scale.detach().double()).norm()
    return float((ours.detach().double() - dense).norm() / norm.clamp_min(1e-6))
