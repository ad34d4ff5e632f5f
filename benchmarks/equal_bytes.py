"""What bytes buy beside "calibrated" adapters of rank 16, as settings of `benchmarks.fine_tuning`.

    codes=N      the codes of the 4-bit base are chosen with error feedback (GPTQ) from N tokens
    span=N       feedback within N columns, from their moments alone; 0: all columns
    frozen=N     N ranks' worth of bytes for the next directions of the error, in bf16 and frozen
    float=N      N ranks' worth of bytes to keep whole layers in bf16; they keep an adapter, begun with B = 0
    by=...       which layers: error (`report.calibration.errors`), per_byte (that, per byte that the layer costs),
                 gain (the square of the error of the layer's output, not divided by the output, per byte), or random
    bare=1       these layers have no adapter, as with exclude_modules
    fresh=1      adapters begin with B = 0; with frozen=N all directions of the error are frozen

A rank's worth of bytes is what one more rank of every adapter takes: 16 bytes for each of its numbers (fp32 weight,
gradient, and two moments of AdamW). A number of a frozen correction takes 2 bytes, a weight in bf16 2 bytes more than
nothing and about 1.48 more than in NF4. So "calibrated,r=24", "calibrated,r=16,frozen=8" and "calibrated,r=16,float=8"
have equal bytes.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from benchmarks.candidate_starts import DAMPING, round_with_feedback
from lightning_qlora import calibrate
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.starts.calibrated import MIN_INPUT_RMS, largest_singular

TRAINED, FROZEN = 16, 2  # bytes of a number


class SpendBytes(Callback):
    """Calibrates a converted module on its first batch, and changes its base by the settings, before the first step.

    Attributes:
        extra: Bytes that the base has more than in 4 bits.
    """

    def __init__(self, settings: dict[str, Any], dense: Any, seed: int, cache: Path) -> None:
        self.settings, self.dense, self.seed, self.cache, self.extra = settings, dense, seed, cache, 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        each: dict[str, Any] = self.settings
        model: Any = module.model
        layers = adapted_layers(model)
        weights = {name: self.dense.get_submodule(name).weight.detach().float() for name in layers}
        if each["codes"]:
            self.choose_codes(each["codes"], layers, weights, trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        model(**next(iter(trainer.datamodule.train_dataloader())))  # type: ignore[attr-defined]
        calibrate(module)
        calibration = trainer.precision_plugin.report.calibration  # type: ignore[attr-defined]
        budget = TRAINED * sum(sum(w.shape) for w in weights.values())
        sizes = {name.removeprefix("model."): value for name, value in calibration.input_rms.items()}
        if each["float"]:
            errors = {name.removeprefix("model."): value for name, value in calibration.errors.items()}
            for name in self.chosen(layers, weights, errors, sizes, each["float"] * budget):
                self.keep(layers[name], weights[name])
                self.extra += FROZEN * weights[name].numel() - layers[name].packed_weight.nbytes
        if each["fresh"]:
            for layer in layers.values():
                begin_anew(layer)
        if each["frozen"]:
            for name, layer in layers.items():
                self.correct(layer, weights[name], sizes[name], round(each["frozen"] * TRAINED / FROZEN))
            self.extra += each["frozen"] * budget

    def choose_codes(
        self, tokens: int, layers: dict[str, Any], weights: dict[str, Tensor], batches: Iterable[Any]
    ) -> None:
        """From the inputs that each layer has in the float model."""
        span = self.settings["span"]
        file = self.cache / f"codes-{len(layers)}-{tokens}-{span}.pt"
        if not file.exists():
            moments = input_moments(self.dense, layers, batches, tokens)
            torch.save(
                {name: feedback(layers[name], weights[name], moments[name], span).packed for name in layers}, file
            )
        for name, packed in torch.load(file).items():
            layers[name].set_packed_weights([replace(layers[name].packed_weight, packed=packed)])

    def chosen(
        self, layers: dict[str, QLoRALinear], weights: dict[str, Tensor], errors: dict[str, float],
        sizes: dict[str, Tensor], budget: float,
    ) -> list[str]:  # fmt: skip
        """The first layers in the order of `by` that cost at most the budget."""
        cost = {name: max(1.0, self.cost(layers[name], weights[name])) for name in layers}
        keys = {
            "error": errors, "per_byte": {name: errors[name] / cost[name] for name in errors},
            "random": {name: Random(f"{self.seed} {name}").random() for name in layers},
            "gain": {name: output_error(layers[name], weights[name], sizes[name]) / cost[name] for name in layers},
        }[self.settings["by"]]  # fmt: skip
        spent, names = 0.0, []
        for name in sorted(layers, key=lambda name: -keys[name]):
            if spent + cost[name] <= budget:
                spent += cost[name]
                names.append(name)
        return names

    def cost(self, layer: QLoRALinear, weight: Tensor) -> float:
        adapter = TRAINED * layer.r * sum(weight.shape) if self.settings["bare"] else 0
        return FROZEN * weight.numel() - layer.packed_weight.nbytes - adapter

    def keep(self, layer: QLoRALinear, weight: Tensor) -> None:
        """Add what the 4 bits took away: the layer computes with its weight in bf16."""
        kept = weight.bfloat16().float() - layer.decode().float()
        layer.register_forward_hook(partial(add, (kept.to(layer.weight_dtype),)))
        begin_anew(layer)
        for parameter in layer.adapter_parameters():
            parameter.requires_grad_(not self.settings["bare"])

    def correct(self, layer: QLoRALinear, weight: Tensor, input_rms: Tensor, rank: int) -> None:
        """Add the largest directions of the error that the adapter leaves, weighted by the inputs."""
        size = input_rms / input_rms.square().mean().sqrt()
        u, sigma, v = largest_singular(left(layer, weight, input_rms), rank)
        parts = (v / size.clamp_min(MIN_INPUT_RMS).unsqueeze(1)).T, u * sigma
        layer.register_forward_hook(partial(add, tuple(part.bfloat16().to(layer.weight_dtype) for part in parts)))


def begin_anew(layer: QLoRALinear) -> None:
    """Give a layer the adapter of "default"."""
    layer.reset_adapter()


@torch.no_grad()
def left(layer: QLoRALinear, weight: Tensor, input_rms: Tensor) -> Tensor:
    """(W - Q - s B A) diag(d), with d of mean square 1 and bounded below."""
    size = input_rms / input_rms.square().mean().sqrt()
    error = weight - layer.packed_weight.dequantize(torch.float32) - layer.scaling * layer.lora_B @ layer.lora_A
    return error * size.clamp_min(MIN_INPUT_RMS)


def output_error(layer: QLoRALinear, weight: Tensor, input_rms: Tensor) -> float:
    """E ||(W - Q - s B A) x||^2 for inputs of the size d."""
    return float(left(layer, weight, input_rms).square().sum() * input_rms.square().mean())


def add(parts: tuple[Tensor, ...], layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    x = args[0]
    for part in parts:
        x = F.linear(x, part)
    return y + x


@torch.no_grad()
def input_moments(
    model: nn.Module, names: Iterable[str], batches: Iterable[dict[str, Tensor]], tokens: int
) -> dict[str, Tensor]:
    """The mean of x x^T over the inputs of each layer, of at least so many tokens; layers with one input share it."""
    last: list[Any] = [None, None]
    moments: dict[str, list[Any]] = {}

    def count(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if x is not last[0]:
            flat = (x[mask[0]] if x.ndim == 3 else x).float()  # a pooler has one row for each text
            total: list[Any] = moments.get(name, [torch.zeros(x.shape[-1], x.shape[-1]), 0])
            total[0].addmm_(flat.T, flat)
            total[1] += len(flat)
            last[:] = x, total
        moments[name] = last[1]

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(count, name)) for name in names]
    seen, mask = 0, [torch.empty(0)]
    for batch in batches:
        mask[0] = batch["attention_mask"].bool()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        seen += int(mask[0].sum())
        if seen >= tokens:
            break
    for hook in hooks:
        hook.remove()
    return {name: total / rows for name, (total, rows) in moments.items()}


def feedback(layer: QLoRALinear, weight: Tensor, moments: Tensor, span: int) -> Any:
    if span:
        place = torch.arange(len(moments)) // span
        moments = moments * (place.unsqueeze(0) == place.unsqueeze(1))
    damped = moments.double() + DAMPING * moments.diagonal().mean() * torch.eye(len(moments))
    return round_with_feedback(weight, layer.packed_weight, damped)
