"""The mean of several adapters, as of the checkpoints of one run (stochastic weight averaging)."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import Adapter, LayerAdapter
from lightning_qlora.layers.layer_state import CheckpointMismatchError

ONE_RUN = 0.75  # the mean of n independent adapters has 1/n of their mean square, that of one run's nearly all


def average(adapters: Sequence[Adapter]) -> Adapter:
    """The mean of each trained tensor of two or more adapters, computed in fp32.

    The mean of A and the mean of B are those of a run only if the adapters are from one run: adapters of two runs have
    other random values in A, and a warning says so. CheckpointMismatchError, with the layer, if they differ in layers,
    ranks, scalings or their base.
    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization".
    """
    if len(adapters) < 2:
        raise ValueError(f"{len(adapters)} adapter(s) to average: pass two or more, and then the output folder.")
    first = adapters[-1]  # the last one names the source
    for other in adapters[:-1]:
        _check_same(first, other)
    layers = _mean_of_layers([adapter.layers for adapter in adapters])
    of_experts = _mean_of_layers([adapter.expert_adapters for adapter in adapters])
    saved = {key: _mean([adapter.saved[key] for adapter in adapters]) for key in first.saved}
    _warn_of_several_runs(adapters, layers | of_experts)
    return replace(first, layers=layers, expert_adapters=of_experts, saved=saved)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[-1]  # a counter, as of a batch norm
    return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(tensors[0].dtype)


def _mean_of_layers(of_each: Sequence[dict[str, LayerAdapter]]) -> dict[str, LayerAdapter]:
    def mean(name: str, part: str) -> Tensor:
        return _mean([getattr(layers[name], part) for layers in of_each])

    return {
        name: LayerAdapter(
            mean(name, "lora_A"),
            mean(name, "lora_B"),
            layer.alpha,
            None if layer.magnitude is None else mean(name, "magnitude"),
        )
        for name, layer in of_each[0].items()
    }


def _check_same(one: Adapter, other: Adapter) -> None:
    here, there = _facts(one), _facts(other)
    for what in here | there:
        ours, theirs = here.get(what, False), there.get(what, False)
        if ours != theirs and None not in (ours, theirs):
            raise CheckpointMismatchError(
                f"{other.source}: {what} is {theirs!r}, and {ours!r} in {one.source}. Average adapters of one run."
            )


def _facts(adapter: Adapter) -> dict[str, Any]:
    """In words -> what adapters of one run have in common; None: not known."""
    layers = adapter.layers | adapter.expert_adapters
    facts: dict[str, Any] = {
        "use_rslora": adapter.use_rslora,
        "trainable_token_indices": adapter.tokens,
        "the quantization and initialization": adapter.quantization or {},
        "the fingerprints of the changed base": adapter.base_fingerprints,
        **{f"whether {name} is trained": True for name in (*layers, *adapter.saved)},
        **{f"{key}: the shape": list(value.shape) for key, value in adapter.saved.items()},
    }
    for name, layer in layers.items():
        facts[f"{name}: the rank"] = layer.r
        facts[f"{name}: lora_alpha"] = layer.alpha
        facts[f"{name}: use_dora"] = layer.magnitude is not None
        facts[f"{name}: the shape"] = layer.lora_B.shape[0], layer.lora_A.shape[1]
        facts[f"{name}: the fingerprint of the base"] = adapter.origin and adapter.origin.fingerprint_of(name)
    return facts


def _warn_of_several_runs(adapters: Sequence[Adapter], means: dict[str, LayerAdapter]) -> None:
    kept = sum(mean.lora_A.float().square().sum().item() for mean in means.values())
    before = [layer for a in adapters for layer in (a.layers | a.expert_adapters).values()]
    each = sum(layer.lora_A.float().square().sum().item() for layer in before) / len(adapters)
    if kept < ONE_RUN * each:
        warnings.warn(
            f"The mean of lora_A has {100 * kept / each:.0f}% of the mean square of the {len(adapters)} adapters, so "
            "they seem to be of different runs: their random initial values cancel, and the mean is no useful adapter. "
            "Average checkpoints of one run.",
            stacklevel=3,
        )
