"""Calibration: the adapters of a "calibrated" module are initialized from its first training batch.

The inputs of the layers are collected before anything trains on that batch, by one of two extra runs (in `isolated`,
so that the training run is the same with and without them):
    one forward pass         The module's first forward pass in training runs twice: once to collect, once as it was
                             called. This works in any training loop.
    whole training steps     The Trainer's next batches run through training_step, without logging, and are trained on
                             later. It is used where one forward pass is not enough: several batches make the first
                             step or `calibration_batches` asks for them, ranks must collect together, or the model is
                             compiled.
Gradients are enabled in the extra run, for code that needs them; its graph is discarded.
"""

import warnings
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_qlora.adapters.module_state import conversion_of
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.layers.dtensor import gather, gather_again, of_all_ranks, reshard, start_sharding, world_size
from lightning_qlora.layers.initialization import methods
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.training.calibration.calibration_report import CalibrationReport
from lightning_qlora.training.calibration.input_statistics import InputStatistics
from lightning_qlora.training.calibration.isolation import isolated, restore_each
from lightning_qlora.training.calibration.patches import logging_disabled
from lightning_qlora.training.calibration.trainer_batches import next_batches, run_training_steps


class Calibration:
    """Collects the inputs of a converted module's layers and initializes their adapters; `report` has its state."""

    def __init__(self, root: nn.Module, config: QLoRAConfig, sharded: bool = False) -> None:
        self._config, self._collecting, self._reported, self._warned = config, False, False, False
        self._layers = {name: layer for name, layer in adapted_layers(root).items() if layer.dense_weight is not None}
        weights: list[Any] = [layer.dense_weight for layer in self._layers.values()]
        if sharded and world_size() > 1:  # each rank keeps the weights of its share of the layers
            for place, layer in enumerate(self._layers.values()):
                if place % world_size() != dist.get_rank():
                    layer.dense_weight = weights[place] = weights[place].to("meta")
        self.report = CalibrationReport(list(self._layers), sum(w.nbytes for w in weights if not w.is_meta))
        # Name -> A, B, input rms: what a state dict from before the calibration needs, until a newer one is saved.
        self._initial: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._hooks = [
            (module, module.register_forward_pre_hook(self._before_forward, with_kwargs=True))
            for module in root.modules()
            if adapted_layers(module)
        ]
        root._qlora_calibration = self  # type: ignore[assignment]
        root.register_state_dict_post_hook(_after_state_dict)  # type: ignore[no-untyped-call]
        root.register_load_state_dict_post_hook(_after_load_state_dict)  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Collect in the forward pass of the outermost module that runs."""
        waiting = self._waiting_layers(module)
        if self._collecting or not waiting or not torch.is_grad_enabled():
            return
        if "forward" in vars(module) and not isinstance(module, QLoRALinear):
            return  # Lightning redirects training_step through DDP by this attribute; the modules inside collect
        if not any(layer.training for layer in waiting.values()):
            self._warn("a forward pass with gradients ran while the module is in eval mode. Call train() first")
            return
        if (self._config.calibration_batches or 1) > 1:
            self._warn(
                f"only one forward pass is used, not calibration_batches={self._config.calibration_batches}: more "
                "batches need the Trainer with automatic optimization"
            )
        self.collect_statistics(module, lambda: module(*args, **kwargs), args, kwargs)
        gather_again(module)

    def before_batch(self, trainer: Trainer, batch: Any) -> None:
        """Collect from this batch of the Trainer and the next ones, where one forward pass is not enough."""
        module = trainer.lightning_module
        if not (self.report.waiting and trainer.training and module.automatic_optimization) or self._collecting:
            return
        index = trainer.fit_loop.epoch_loop.batch_idx + 1
        asked = self._config.calibration_batches or trainer.accumulate_grad_batches
        count = int(min(asked, trainer.num_training_batches - index))
        if count > 1 or world_size() > 1 or any(_is_compiled(part) for part in module.modules()):
            start_sharding(module)
            batches = restore_each(next_batches(trainer, batch, count))
            with torch.compiler.set_stance("force_eager"):
                self.collect_statistics(module, lambda: run_training_steps(trainer, batches, index))

    def collect_statistics(self, module: nn.Module, run: Callable[[], Any], *arguments: Any) -> None:
        """Collect the inputs of the module's waiting layers while `run` runs it, then initialize their adapters.

        `arguments` are the inputs of `run`, which are restored afterwards.
        """
        layers, began = self._waiting_layers(module), perf_counter()
        statistics = InputStatistics(layers)
        self._collecting = True
        try:
            with logging_disabled(module), isolated(module, *arguments), statistics.collecting():
                run()
                reshard(module)  # adapters are written to the parts that the ranks keep
        finally:
            self._collecting = False
        statistics.sum_over_ranks()
        rms = {name: statistics.rms(name) for name in layers}  # before any adapter changes: an error changes none
        for name, source in _sources(layers).items():
            self._initialize(name, rms[name], source)
            self.report.rows = max(self.report.rows, statistics.rows(name))
        self.report.seconds += perf_counter() - began
        self._remove_hooks()

    def _initialize(self, name: str, rms: Tensor, source: int) -> None:
        layer = self._layers[name]
        self.report.waiting.remove(name)
        if gather(layer.lora_B).any():
            layer.dense_weight = None
            self._warn(f"{name} was trained before its calibration (in eval mode?), so its adapter is not changed")
            return
        error = initialize_from_inputs(layer, rms, source)
        if error is not None:
            self.report.errors[name] = error
        if rms.any():
            self.report.calibrated.append(name)
            self._initial[name] = layer.lora_A.detach().cpu().clone(), layer.lora_B.detach().cpu().clone(), rms.cpu()
        else:
            self.report.unseen.append(name)

    def before_step(self, optimizer: Optimizer) -> None:
        """Raise RuntimeError if the step would train an adapter that is not calibrated yet; else report once."""
        if not self.report.waiting:
            return
        params = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self._waiting_layers().items():
            if id(layer.lora_B) in params and layer.lora_B.grad is not None and layer.lora_B.grad.any():
                raise RuntimeError(
                    f"init_lora_weights='calibrated': the optimizer steps before the adapter of {name} is calibrated. "
                    "Calibration runs in the first forward pass in training mode: call model.train(), and call the "
                    "model itself (not a method other than forward)."
                )
        self._report_once()

    def cancel(self) -> None:
        """Free the dense weights and the kept adapters; no layer waits any more."""
        self.report.waiting.clear()
        self._initial.clear()
        for layer in self._layers.values():
            if isinstance(layer, QLoRALinear):  # not merged
                layer.dense_weight = None
        self._remove_hooks()

    def after_load(self, initialization: str) -> None:
        """Set the state of every layer by what was loaded: calibrated, not yet calibrated, or initialized otherwise."""
        if initialization != "calibrated":
            self.cancel()
        for name, layer in self._layers.items():
            if not isinstance(layer, QLoRALinear):
                continue
            if layer.input_rms is not None or gather(layer.lora_B).any():
                layer.dense_weight = None
                self._initial.pop(name, None)
                if name in self.report.waiting:
                    self.report.waiting.remove(name)
            elif name in self._initial:  # a state dict from before the calibration
                lora_a, lora_b, layer.input_rms = self._initial[name]
                layer.set_adapter(lora_a, lora_b)
            elif name not in self.report.waiting and name in self.report.calibrated:
                self._warn(
                    "the loaded state dict was saved before the calibration, and the dense weights are freed: "
                    f"{name} now has the default initialization. Load it into a newly built module instead"
                )
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        """Remove the hooks of modules without a waiting layer, so that torch.compile can trace them."""
        waiting = {id(layer) for layer in self._waiting_layers().values()}
        for module, hook in self._hooks:
            if waiting.isdisjoint(map(id, module.modules())):
                hook.remove()
        if not self.report.waiting:
            self._report_once()

    def _report_once(self) -> None:
        if self.report.calibrated and not self._reported:
            self._reported = True
            rank_zero_info(f"QLoRA: {self.report}")

    def _waiting_layers(self, module: nn.Module | None = None) -> Mapping[str, QLoRALinear]:
        """Name -> layer that waits, of the module or (None) of the root; without merged layers."""
        inside = None if module is None else {id(part) for part in module.modules()}
        waiting = {name: self._layers[name] for name in self.report.waiting}
        return {
            name: layer
            for name, layer in waiting.items()
            if isinstance(layer, QLoRALinear) and (inside is None or id(layer) in inside)
        }

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"init_lora_weights='calibrated': {what}.", stacklevel=2)


@torch.no_grad()
def initialize_from_inputs(layer: QLoRALinear, input_rms: Tensor, source: int = 0) -> float | None:
    """Initialize a waiting layer from the RMS of its inputs [in]: computed on rank `source`, then broadcast.

    Returns `methods.calibrated_error`; None if there is nothing to compute.
    """
    dense, layer.dense_weight, layer.input_rms = layer.dense_weight, None, input_rms.cpu()
    if dense is None or not input_rms.any():
        return None
    base, device = layer.packed_weight, layer.packed.device  # of a sharded layer all ranks gather the base
    lora_a, lora_b = (torch.empty(part.shape, device=device) for part in (layer.lora_A, layer.lora_B))
    error = torch.empty((), device=device)
    if world_size() == 1 or dist.get_rank() == source:
        with torch.autocast(device.type, enabled=False):
            weight = dense.to(device, layer.weight_dtype)
            made = methods.calibrated_adapter(weight, base, input_rms, layer.config, layer.seed_name)
            error = methods.calibrated_error(weight, base, input_rms, *made, layer.scaling)
        lora_a, lora_b = (part.contiguous() for part in made)
    if world_size() > 1:
        for value in (lora_a, lora_b, error):
            dist.broadcast(value, source)
    layer.set_adapter(lora_a, lora_b)
    return float(error)


def _sources(layers: Mapping[str, QLoRALinear]) -> dict[str, int]:
    """Name -> rank that computes the adapter: one that has the float weight, so that the ranks share the work."""
    # On the meta device where another rank has it.
    weights = {name: layer.dense_weight for name, layer in layers.items()}
    held = of_all_ranks([name for name, weight in weights.items() if weight is not None and not weight.is_meta])
    ranks = {name: [rank for rank, names in enumerate(held) if name in names] or [0] for name in layers}
    return {name: having[place % len(having)] for place, (name, having) in enumerate(ranks.items())}


def calibration_of(root: nn.Module | None) -> Calibration | None:
    """The calibration of a converted module, pending or done; None without one."""
    return None if root is None else vars(root).get("_qlora_calibration")


def _after_state_dict(root: nn.Module, *_: Any) -> None:
    calibration = calibration_of(root)
    if calibration is not None:
        calibration._initial.clear()  # the saved state has the calibrated adapters


def _after_load_state_dict(root: nn.Module, _: Any) -> None:
    calibration, conversion = calibration_of(root), conversion_of(root)
    if calibration is not None and conversion is not None:
        calibration.after_load(conversion.config.initialization)


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
