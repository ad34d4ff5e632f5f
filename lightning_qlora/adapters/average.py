"""The mean of several adapters, as of the checkpoints of one run (stochastic weight averaging)."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_qlora.adapters.adapter import Adapter, LayerAdapter
from lightning_qlora.layers.state_dict import CheckpointMismatchError

ONE_RUN = 0.75  # of independent adapters the mean has 1/n of their mean square; of one run's, nearly all


def average(adapters: Sequence[Adapter]) -> Adapter:
    """The mean of each trained tensor of several adapters, computed in fp32.

    The mean of A and the mean of B are those of a run only if the adapters are from one run: adapters of two runs have
    other random values in A, and a warning says so.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization".

    Args:
        adapters: Two or more, with the same layers, ranks and scalings, on the same base.

    Raises:
        ValueError: If there are fewer than two.
        CheckpointMismatchError: If they differ in layers, ranks, scalings or their base; names the layer.
    """
    if len(adapters) < 2:
        raise ValueError(f"{len(adapters)} adapter(s) to average: pass two or more, and then the output folder.")
    first = adapters[-1]  # the last one names the source
    for other in adapters[:-1]:
        _check_same(first, other)
    layers = {name: _mean_of_layer([a.layers[name] for a in adapters]) for name in first.layers}
    packed = {name: _mean_of_layer([a.packed[name] for a in adapters]) for name in first.packed}
    saved = {key: _mean([a.saved[key] for a in adapters]) for key in first.saved}
    _warn_of_several_runs(adapters, layers | packed)
    return replace(first, layers=layers, packed=packed, saved=saved)


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors[0].is_floating_point():
        return tensors[-1]  # a counter, as of a batch norm
    return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(tensors[0].dtype)


def _mean_of_layer(layers: Sequence[LayerAdapter]) -> LayerAdapter:
    magnitudes = [layer.magnitude for layer in layers if layer.magnitude is not None]
    return LayerAdapter(
        _mean([layer.lora_A for layer in layers]),
        _mean([layer.lora_B for layer in layers]),
        layers[0].alpha,
        _mean(magnitudes) if magnitudes else None,
    )


def _check_same(one: Adapter, other: Adapter) -> None:
    def differ(what: str, here: object, there: object) -> None:
        if here != there:
            raise CheckpointMismatchError(
                f"{other.source}: {what} is {there!r}, and {here!r} in {one.source}. Average adapters of one run."
            )

    differ("use_rslora", one.use_rslora, other.use_rslora)
    differ("the quantization and initialization", one.quantization, other.quantization)
    differ("the fingerprints of the changed base", one.base_fingerprints, other.base_fingerprints)
    here, there = one.layers | one.packed, other.layers | other.packed
    odd = sorted(here.keys() ^ there.keys()) + sorted(one.saved.keys() ^ other.saved.keys())
    if odd:
        differ(
            f"whether {odd[0]} is trained",
            odd[0] in here or odd[0] in one.saved,
            odd[0] in there or odd[0] in other.saved,
        )
    for name, layer in here.items():
        differ(f"{name}: the rank", layer.r, there[name].r)
        differ(f"{name}: lora_alpha", layer.alpha, there[name].alpha)
        differ(f"{name}: use_dora", layer.magnitude is None, there[name].magnitude is None)
        differ(f"{name}: the shape", _shape(layer), _shape(there[name]))
        if one.origin is not None and other.origin is not None and name in one.layers:
            prints = one.origin.fingerprint_of(name), other.origin.fingerprint_of(name)
            differ(f"{name}: the fingerprint of the base", *prints)
    for key, value in one.saved.items():
        differ(f"{key}: the shape", list(value.shape), list(other.saved[key].shape))


def _shape(layer: LayerAdapter) -> tuple[int, int]:
    return layer.lora_B.shape[0], layer.lora_A.shape[1]


def _warn_of_several_runs(adapters: Sequence[Adapter], means: dict[str, LayerAdapter]) -> None:
    kept = sum(mean.lora_A.float().square().sum().item() for mean in means.values())
    each = sum(
        layer.lora_A.float().square().sum().item() for a in adapters for layer in (a.layers | a.packed).values()
    ) / len(adapters)
    if kept < ONE_RUN * each:
        warnings.warn(
            f"The mean of lora_A has {100 * kept / each:.0f}% of the mean square of the {len(adapters)} adapters, so "
            "they seem to be of different runs: their random initial values cancel, and the mean is no useful adapter. "
            "Average checkpoints of one run.",
            stacklevel=3,
        )
