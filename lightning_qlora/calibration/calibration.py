"""Calibration: `init_lora_weights="calibrated"` initializes adapters from the batches of the first step.

Until then B is 0, so the module computes what its 4-bit base computes, and its own forward passes show the inputs of
every layer (`starts/input_statistics.py`). After the backward passes of the first step and before the step, the
adapters are initialized: in the Trainer and Fabric by the plugin's `optimizer_step`, from the batches of all ranks; in
a loop of your own by a call of `calibrate`. Their gradients belong to the values before and are dropped, so the first
step does not change them.
"""

import warnings
from collections.abc import Iterable
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_qlora.calibration.calibrated_adapter import (
    adapter_of,
    keep_weights_of_this_rank,
    ranks_with_weights,
    root_mean_square,
)
from lightning_qlora.calibration.calibration_report import CalibrationReport
from lightning_qlora.checks import check_module
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.optim.optimizer_parameters import optimizer_parameters
from lightning_qlora.starts.input_statistics import FINITE_ROWS, TRAINING_ROWS, InputStatistics
from lightning_qlora.tensors.dtensor import gather, is_sharded, world_size

ALL_RANKS = "Call it on all ranks with replicas=torch.distributed.group.WORLD"


def calibrate(module: nn.Module, replicas: Any = None) -> None:
    """Initialize the adapters that wait for inputs (`init_lora_weights="calibrated"`), from those that they had so far.

    A loop of your own calls it between the first backward pass (or several) and the first step; if the step gets a
    closure, after the backward pass in it. The Trainer and Fabric need no call. Further calls do nothing.

    Args:
        module: A converted module.
        replicas: The ranks that train the same layers, as `torch.distributed.group.WORLD` with DDP and FSDP: all of
            them must call it, and their inputs count together. None: this rank alone has these layers, as the stage of
            a pipeline; with several ranks a warning says so, and a group of this rank alone gives none.

    Raises:
        RuntimeError: If there are gradients, and no forward pass ran in training mode.
        ValueError: If all inputs of a layer have NaN or Inf, or ranks share its parameters and replicas is None.

    Example:
        ```python
        import torch
        from lightning_qlora import calibrate, convert
        from torch import nn

        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        convert(model, r=4, init_lora_weights="calibrated")
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
        model(torch.randn(8, 64)).sum().backward()
        calibrate(model)
        optimizer.step()
        ```
    """
    check_module("module", module)
    waiting = waiting_in(module.modules())
    if replicas is None and world_size() > 1:
        _check_alone(waiting)
    conversions: dict[int, list[InputStatistics]] = {}
    for statistics in waiting:
        conversions.setdefault(id(statistics.report), []).append(statistics)
    for of_conversion in conversions.values():
        _calibrate_together(of_conversion, replicas)


def _check_alone(waiting: list[InputStatistics]) -> None:
    for statistics in waiting:
        if any(is_sharded(layer.lora_B) for layer in statistics.layers):
            raise ValueError(f"replicas=None: several ranks hold parts of {statistics.name}. {ALL_RANKS}.")
    if waiting:
        warnings.warn(
            f"calibrate: replicas=None on one of {world_size()} ranks. If others train the same layers (DDP), the "
            f"adapters of each rank begin with other values. {ALL_RANKS}, or the group of the ranks that have these "
            "layers.",
            stacklevel=3,
        )


class Calibration(CalibrationReport):
    """The adapters of one conversion that wait for inputs; the plugin calls it in the first step of an optimizer."""

    def before_step(self, observers: list[InputStatistics], optimizer: Optimizer) -> None:
        """Initialize those that an optimizer holds, after a backward pass; all ranks must call it."""
        chosen = _of_optimizer(optimizer, observers)
        if chosen:
            _calibrate_together(chosen, dist.group.WORLD if world_size() > 1 else None)

    def before_closure(self, observers: list[InputStatistics], optimizer: Optimizer) -> None:
        """The same before `step(closure)`, if there are gradients already, which become 0.

        Sharpness-aware minimization (SAM) changes the parameters along them before it calls the closure.
        """
        chosen = _of_optimizer(optimizer, observers)
        parameters = [parameter for each in chosen for layer in each.layers for parameter in layer.adapter_parameters()]
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        if with_gradient and any(bool(each.sums[:, TRAINING_ROWS].any()) for each in chosen):
            self.before_step(chosen, optimizer)
            for parameter in with_gradient:
                parameter.grad = torch.zeros_like(parameter)


def calibration_of(modules: Iterable[nn.Module], sharded: bool) -> Calibration:
    """That of the layers among these modules, some of which wait for inputs; `sharded`: see `waiting_in`."""
    calibration: Calibration = waiting_in(modules, sharded)[0].report
    return calibration


def waiting_in(modules: Iterable[nn.Module], sharded: bool = False) -> list[InputStatistics]:
    """Those of the layers among these modules that wait for inputs. New ones get a report that they share.

    `sharded`: a strategy splits the layers over all ranks, which then share the work.
    """
    layers = [module for module in modules if isinstance(module, LoRALayer)]
    statistics = dict.fromkeys(layer.input_observer for layer in layers)
    waiting = [each for each in statistics if each is not None]
    new = [each for each in waiting if each.report is None]
    if new:
        if sharded and world_size() > 1:
            keep_weights_of_this_rank(new)
        host_bytes = sum(each.dense_weight.nbytes for each in new if each.has_weight)
        report = Calibration([each.name for each in new], host_bytes)
        for each in new:
            each.report = report
    return waiting


def _of_optimizer(optimizer: Optimizer, waiting: list[InputStatistics]) -> list[InputStatistics]:
    parameters = {id(parameter) for parameter in optimizer_parameters(optimizer)}
    return [each for each in waiting if any(id(layer.lora_B) in parameters for layer in each.layers)]


@torch.no_grad()
def _calibrate_together(waiting: list[InputStatistics], group: Any) -> None:
    """Initialize adapters of one conversion from the inputs that they had so far; without any do nothing.

    `group`: the ranks that have the same layers, all of which must call this; None: this rank alone.
    """
    start = perf_counter()
    report: CalibrationReport = waiting[0].report
    sums = _sums_of(waiting, group)
    if not any(bool(total[:, TRAINING_ROWS].any()) for total in sums):
        for statistics in waiting:
            if any(layer.lora_B.grad is not None for layer in statistics.layers):
                raise RuntimeError(
                    "init_lora_weights='calibrated': the optimizer steps before the adapter of "
                    f"{statistics.name} is calibrated, because no forward pass ran in training mode. "
                    "Call model.train() before it."
                )
        return  # a step without a backward pass, to create the optimizer's state
    values = [root_mean_square(statistics.name, total) for statistics, total in zip(waiting, sums, strict=True)]
    ranks = ranks_with_weights(waiting, group)
    for statistics, input_rms, rank in zip(waiting, values, ranks, strict=True):
        _initialize(statistics, report, input_rms, rank, group)
    report.rows = max(report.rows, *(int(total[:, FINITE_ROWS].max()) for total in sums))
    report.seconds += perf_counter() - start
    if not report.waiting:
        rank_zero_info(f"QLoRA: {report}")


def _initialize(
    statistics: InputStatistics, report: CalibrationReport, input_rms: Tensor, rank: int, group: Any
) -> None:
    name = statistics.name
    layers = []
    for layer in statistics.layers:
        layer.stop_observing()
        if gather(layer.lora_B).any():
            warnings.warn(
                f"init_lora_weights='calibrated': {name} was trained before its calibration, so its adapter is not "
                "changed.",
                stacklevel=2,
            )
        else:
            layers.append(layer)
    if not layers:
        return
    report.input_rms[name] = layers[0].join_matrices(input_rms.cpu().unbind())
    lora_a, lora_b, errors = adapter_of(layers[0], statistics.dense_weight, input_rms, rank, group)
    computed = [error for error in errors if error is not None]
    for layer in layers:
        if computed:
            layer.set_adapter(lora_a, lora_b)
        layer.set_initial((lora_a, lora_b))
        for parameter in layer.adapter_parameters():
            parameter.grad = None  # the optimizer's step skips it
    if not computed:
        report.unseen.append(name)
        return
    report.unseen += [f"{name}.{number}" for number, error in enumerate(errors) if error is None]
    report.errors[name] = max(computed)
    report.calibrated.append(name)


def _sums_of(waiting: list[InputStatistics], group: Any) -> list[Tensor]:
    for statistics in waiting:
        statistics.to(statistics.layers[0].packed.device)
    sums = [statistics.sums for statistics in waiting]
    if group is None:
        return sums
    flat = torch.cat([total.flatten() for total in sums])
    dist.all_reduce(flat, group=group)
    parts = torch.split(flat, [total.numel() for total in sums])
    return [*map(Tensor.view_as, parts, sums)]
