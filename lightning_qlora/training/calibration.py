"""Calibration: `init_lora_weights="calibrated"` initializes adapters from the batches of an optimizer's first step.

Until then B is 0, so the module computes what its 4-bit base computes, and its own forward passes show the inputs of
every layer (`layers/input_statistics.py`). At the first step of an optimizer, after its backward passes, the adapters
in it are initialized. Their gradients belong to the values before and are dropped, so the first step does not change
them. All batches that make the step count: in the Trainer and Fabric on all ranks; in a loop of your own on those that
`calibrate` names.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_qlora.checks import check_module
from lightning_qlora.layers.dtensor import gather, world_size
from lightning_qlora.layers.input_statistics import InputStatistics, stop_waiting
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.optim.closure import before_update, closure_of
from lightning_qlora.training.calibrated_adapter import (
    adapter_of,
    keep_weights_of_this_rank,
    ranks_with_weights,
    root_mean_square,
)
from lightning_qlora.training.calibration_report import CalibrationReport
from lightning_qlora.training.optimizers import parameters_of


class Calibration:
    """The layers of one conversion whose adapters wait for inputs; see the top of this file.

    Attributes:
        report: The status of the layers.
    """

    def __init__(self, root: nn.Module, sharded: bool = False) -> None:
        self._waiting: dict[InputStatistics, str] = {}  # -> name of the layer
        for name, layer in adapted_layers(root).items():
            statistics = layer.input_statistics
            if statistics is not None and statistics.calibration is None:
                statistics.calibration = self
                self._waiting[statistics] = name
        if sharded and world_size() > 1:
            keep_weights_of_this_rank(self._waiting)
        weights = [statistics.dense_weight for statistics in self._waiting]
        host_bytes = sum(weight.nbytes for weight in weights if not weight.is_meta)
        self.report = CalibrationReport(list(self._waiting.values()), host_bytes)
        _watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """An unpickled module waits for its own first step; copies wait with the module that they are copies of."""
        vars(self).update(state)
        if self._waiting:
            _watch(self)

    def add(self, statistics: InputStatistics, name: str) -> None:
        """A copy of a layer got another weight, with which it waits."""
        statistics.calibration = self
        self._waiting[statistics] = name

    def remove(self, statistics: InputStatistics) -> None:
        """The layers of these statistics got their values."""
        name = self._waiting.pop(statistics, None)
        if name in self.report.waiting and name not in self._waiting.values():
            self.report.waiting.remove(name)
        if not self._waiting:
            _calibrations.pop(self, None)
            _remove_hook_if_none_waits()

    def held_by(self, optimizer: Optimizer) -> list[InputStatistics]:
        """Those of the layers whose adapters an optimizer holds."""
        parameters = {id(parameter) for parameter in parameters_of(optimizer)}
        return [each for each in self._waiting if any(id(layer.lora_B) in parameters for layer in each.layers)]

    @torch.no_grad()
    def initialize(self, waiting: Iterable[InputStatistics], group: Any = None) -> None:
        """Initialize adapters from the inputs that they had so far; without any input do nothing.

        `group`: the ranks that have the same layers, all of which must call this; None: this rank alone.
        """
        start = perf_counter()
        waiting = [each for each in waiting if each in self._waiting and each.layers]
        sums = self._sums_of(waiting, group)
        if not any(bool(total[:, -1].any()) for total in sums):
            for statistics in waiting:
                if any(layer.lora_B.grad is not None for layer in statistics.layers):
                    raise RuntimeError(
                        "init_lora_weights='calibrated': the optimizer steps before the adapter of "
                        f"{self._waiting[statistics]} is calibrated, because no forward pass ran in training mode. "
                        "Call model.train() before it."
                    )
            return  # a step without a backward pass, to create the optimizer's state
        names = [self._waiting[each] for each in waiting]
        values = [*map(root_mean_square, names, sums)]
        ranks = ranks_with_weights(waiting, group)
        for place, statistics in enumerate(waiting):
            self._initialize(statistics, values[place], ranks[place], group)
        rows = max(int(total[:, -2].max()) for total in sums)
        self.report.rows = max(self.report.rows, rows)
        self.report.seconds += perf_counter() - start
        if not self._waiting:
            rank_zero_info(f"QLoRA: {self.report}")

    def _initialize(self, statistics: InputStatistics, input_rms: Tensor, rank: int, group: Any) -> None:
        """Initialize a layer and its copies."""
        name = self._waiting[statistics]
        layers = []
        for layer in statistics.layers:
            stop_waiting(layer)
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
        report = self.report
        report.input_rms[name] = layers[0].join_matrices(input_rms.cpu().unbind())
        lora_a, lora_b, errors = adapter_of(layers[0], statistics.dense_weight, input_rms, rank, group)
        for layer in layers:
            if any(error is not None for error in errors):
                layer.set_adapter(lora_a, lora_b)
            layer.set_initial((lora_a, lora_b))
            for parameter in layer.adapter_parameters():
                parameter.grad = None  # the optimizer's step skips it
        computed = [error for error in errors if error is not None]
        if not computed:
            report.unseen.append(name)
            return
        report.unseen += [f"{name}.{number}" for number, error in enumerate(errors) if error is None]
        report.errors[name] = max(computed)
        report.calibrated.append(name)

    def _sums_of(self, waiting: list[InputStatistics], group: Any) -> list[Tensor]:
        """The sums of each, over the ranks of the group, on the device of the layer."""
        for statistics in waiting:
            statistics.to(statistics.layers[0].packed.device)
        sums = [statistics.sums for statistics in waiting]
        if group is not None and sums:
            flat = torch.cat([total.flatten() for total in sums])
            dist.all_reduce(flat, group=group)
            parts = torch.split(flat, [total.numel() for total in sums])
            sums = [*map(Tensor.view_as, parts, sums)]
        return sums


# Those with layers that wait, in the order in which they were made: the same on all ranks.
_calibrations: weakref.WeakKeyDictionary[Calibration, None] = weakref.WeakKeyDictionary()
_step_hook: RemovableHandle | None = None  # one hook of torch serves all of them
_has_plugin = False  # whether the plugin takes the present step


def _watch(calibration: Calibration) -> None:
    """Let the first step of an optimizer initialize the adapters in it."""
    global _step_hook
    _calibrations[calibration] = None
    weakref.finalize(calibration, _remove_hook_if_none_waits)
    if _step_hook is None:
        _step_hook = register_optimizer_step_pre_hook(_before_step)


def _remove_hook_if_none_waits() -> None:
    global _step_hook
    if _step_hook is not None and not [*_calibrations]:
        _step_hook.remove()
        _step_hook = None


def calibrate(module: nn.Module, replicas: Any = None) -> None:
    """Initialize the adapters that wait for inputs (`init_lora_weights="calibrated"`), from those that they had so far.

    The Trainer, Fabric, and on one rank the first step of any optimizer do so. A loop of your own on several ranks
    calls it between the first backward pass and the step.

    Args:
        module: A converted module.
        replicas: The ranks that train the same layers, as `torch.distributed.group.WORLD` with DDP and FSDP: all of
            them must call it, and their inputs count together. None: this rank alone has these layers, as the stage of
            a pipeline.

    Raises:
        RuntimeError: If there are gradients, and no forward pass ran in training mode.
        ValueError: If all inputs of a layer have NaN or Inf.

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
    waiting: dict[Calibration, list[InputStatistics]] = {}
    for layer in adapted_layers(module).values():
        statistics = layer.input_statistics
        if statistics is not None and statistics.calibration is not None:
            waiting.setdefault(statistics.calibration, []).append(statistics)
    for calibration, each in waiting.items():
        calibration.initialize(dict.fromkeys(each), replicas)


def _held_by(optimizer: Optimizer) -> list[InputStatistics]:
    """The layers that wait and whose adapters an optimizer holds."""
    return [each for calibration in [*_calibrations] for each in calibration.held_by(optimizer)]


def calibrate_before_step(optimizer: Optimizer) -> None:
    """Initialize the adapters that an optimizer holds, after its first backward passes; all ranks must call it."""
    group = dist.group.WORLD if world_size() > 1 else None
    for calibration in [*_calibrations]:
        waiting = calibration.held_by(optimizer)
        if waiting:
            calibration.initialize(waiting, group)


def calibrate_before_closure(optimizer: Optimizer) -> None:
    """The same before `step(closure)`, if there are gradients already, which become 0.

    Sharpness-aware minimization (SAM) changes the parameters along them before it calls the closure.
    """
    held = _held_by(optimizer)
    parameters = [parameter for each in held for layer in each.layers for parameter in layer.adapter_parameters()]
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if with_gradient and any(bool(each.sums[:, -1].any()) for each in held):
        calibrate_before_step(optimizer)
        for parameter in with_gradient:
            parameter.grad = torch.zeros_like(parameter)


@contextmanager
def step_of_all_ranks() -> Iterator[None]:
    """Within this the Trainer or Fabric steps, whose plugin calls the functions above, and the hook does nothing."""
    global _has_plugin
    previous = _has_plugin
    _has_plugin = True
    try:
        yield
    finally:
        _has_plugin = previous


def _before_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Initialize in a step of a loop of your own."""
    if _has_plugin:
        return None
    if closure_of(args, kwargs) is not None:
        _calibrate_alone(optimizer, calibrate_before_closure)
    return before_update(args, kwargs, lambda: _calibrate_alone(optimizer, calibrate_before_step))


def _calibrate_alone(optimizer: Optimizer, calibrate: Callable[[Optimizer], None]) -> None:
    """In a step outside of the Trainer and Fabric, where nothing is collective unless it is named so."""
    if world_size() > 1:
        trained = [each for each in _held_by(optimizer) if any(layer.lora_B.grad is not None for layer in each.layers)]
        if trained:
            raise RuntimeError(
                f"init_lora_weights='calibrated': the optimizer steps before the adapter of "
                f"{trained[0].layers[0].full_name} is calibrated, and only the Trainer and Fabric do so for several "
                "ranks. Call lightning_qlora.calibrate(module, replicas=torch.distributed.group.WORLD) after the first "
                "backward pass on all ranks that train the same layers, or calibrate(module) on a rank with layers of "
                "its own, as the stage of a pipeline."
            )
        return
    calibrate(optimizer)


def calibration_of(modules: Iterable[nn.Module]) -> Calibration | None:
    """The calibration that layers among these modules wait for; None if none waits."""
    for layer in modules:
        if isinstance(layer, LoRALayer) and layer.input_statistics is not None:
            calibration: Calibration | None = layer.input_statistics.calibration
            return calibration
    return None
