"""The start that waits for data: adapters of a "calibrated" module start when its first training batch comes.

Two ways to see that batch before anything trains on it, both without a trace (`undisturbed`):
    the first forward pass   run once without gradients to look, then as it was called: any loop, and the Trainer where
                             one batch makes a step. Nothing but the forward pass itself is run twice.
    the first batches        where several make the first step, or `calibration_batches` asks for them: the Trainer's
                             next batches go through training_step without gradients, muted, and stay in line.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_qlora import seams, starts
from lightning_qlora.calibration.input_sizes import InputSizes
from lightning_qlora.calibration.undisturbed import undisturbed
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.linear import QLoRALinear, adapted_layers
from lightning_qlora.random_state import world_size


@dataclass
class CalibrationReport:
    """What became of the adapters that start from data.

    Attributes:
        waiting: Names of the layers that have not met a training batch yet; they start as by default.
        calibrated: Names of those that started from their inputs.
        unseen: Names of those that no input reached when their module ran; they keep the default start.
        rows: Most rows (tokens) that one layer saw, on all ranks.
        host_bytes: Dense weights kept in host memory (or in the file they are mapped from) until the start.
        seconds: Time of looking and starting.
    """

    waiting: list[str]
    host_bytes: int
    calibrated: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    rows: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.waiting:
            return (
                f"{len(self.waiting)} adapters start with the first training batch; until then {self.host_bytes:,} "
                "bytes of dense weights stay in host memory"
            )
        unseen = f"; no input reached {', '.join(self.unseen)}: default start" if self.unseen else ""
        return (
            f"{len(self.calibrated)} adapters started from {self.rows:,} rows of data in {self.seconds:.1f} s, "
            f"{self.host_bytes:,} bytes released{unseen}"
        )


class Calibration:
    """Sees a converted module's first training batch and starts its adapters from it.

    Attributes:
        report: What became of them so far.
    """

    def __init__(self, root: nn.Module, config: QLoRAConfig) -> None:
        self._config, self._looking, self._warned = config, False, False
        layers = {name: layer for name, layer in adapted_layers(root).items() if layer.dense_weight is not None}
        sizes = (layer.dense_weight.nbytes for layer in layers.values() if layer.dense_weight is not None)
        self.report = CalibrationReport(list(layers), sum(sizes))
        self._layers = layers
        self._hooks = [
            module.register_forward_pre_hook(self._before_forward, with_kwargs=True)
            for module in root.modules()
            if adapted_layers(module)
        ]
        root._qlora_calibration = self  # type: ignore[assignment]
        root.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The outermost module of a forward pass in training looks at its own input first."""
        waiting = self._waiting_in(module)
        if self._looking or not waiting or not torch.is_grad_enabled():
            return
        if "forward" in vars(module) and not isinstance(module, QLoRALinear):
            return  # Lightning redirects a training_step through DDP by this attribute; the modules in it will look
        if not any(layer.training for layer in waiting.values()):
            self._warn("a forward pass with gradients met the module in eval mode. Call train() before training")
            return
        if (self._config.calibration_batches or 1) > 1:
            self._warn(
                "the first forward pass is all that can be seen here, not calibration_batches="
                f"{self._config.calibration_batches}: more needs the Trainer with automatic optimization"
            )
        self.look(module, lambda: module(*args, **kwargs), args, kwargs)

    def before_batch(self, trainer: Trainer, batch: Any) -> None:
        """Look at this batch of the Trainer and those that come after it, where one alone is not the first step."""
        automatic = trainer.lightning_module.automatic_optimization
        if not (self.report.waiting and trainer.training and automatic) or self._looking:
            return
        index = trainer.fit_loop.epoch_loop.batch_idx + 1
        asked = self._config.calibration_batches or trainer.accumulate_grad_batches
        count = int(min(asked, trainer.num_training_batches - index))
        if count > 1:
            batches = [batch, *seams.coming_batches(trainer, count - 1)]
            self.look(trainer.lightning_module, lambda: seams.rehearse(trainer, batches, index), batches)

    def look(self, module: nn.Module, run: Callable[[], Any], *arguments: Any) -> None:
        """Run without gradients and without a trace, then start the layers of the module that still wait.

        Args:
            module: The module that `run` runs.
            run: Feeds it training data.
            *arguments: What `run` feeds, to be left as it is.
        """
        layers, began = self._waiting_in(module), time.perf_counter()
        sizes = InputSizes(layers)
        self._looking = True
        try:
            with undisturbed(module, *arguments), torch.no_grad(), sizes.observed():
                run()
        finally:
            self._looking = False
        sizes.sum_over_ranks()
        for place, (name, layer) in enumerate(layers.items()):
            self.report.waiting.remove(name)
            seen = sizes.rms(name)
            (self.report.calibrated if seen.any() else self.report.unseen).append(name)
            self.report.rows = max(self.report.rows, sizes.rows(name))
            start_from(layer, seen, source=place % world_size())
        self.report.seconds += time.perf_counter() - began
        if not self.report.waiting:
            self.close()
            rank_zero_info(f"QLoRA: {self.report}")

    def check_started(self) -> None:
        """Refuse a step of an optimizer while no adapter has started.

        Raises:
            RuntimeError: As above.
        """
        if self.report.waiting and not self.report.calibrated:
            raise RuntimeError(
                "init_lora_weights='calibrated': the optimizer steps before any adapter has started. They start in the "
                "first forward pass in training mode: call model.train(), and run the model itself (its forward)."
            )

    def close(self) -> None:
        """Let go of the dense weights: nothing waits any more."""
        self.report.waiting.clear()
        for layer in self._layers.values():
            layer.dense_weight = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _waiting_in(self, module: nn.Module) -> dict[str, QLoRALinear]:
        inside = {id(part) for part in module.modules()}
        return {name: self._layers[name] for name in self.report.waiting if id(self._layers[name]) in inside}

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"init_lora_weights='calibrated': {what}.", stacklevel=2)


@torch.no_grad()
def start_from(layer: QLoRALinear, input_rms: Tensor, source: int = 0) -> None:
    """Start a waiting layer from its input sizes [in]: computed on rank `source`, the same bits on every rank.

    Raises:
        RuntimeError: If the adapter is sharded.
    """
    if isinstance(layer.lora_A.data, DTensor):
        raise RuntimeError(
            f"{layer.full_name}: init_lora_weights='calibrated' can't start an adapter that is sharded already (FSDP2, "
            "tensor parallel). Use 'loftq' or 'pissa', which start before sharding."
        )
    dense, layer.dense_weight, layer.input_rms = layer.dense_weight, None, input_rms.cpu()
    if dense is None or not input_rms.any():
        return
    lora_a, lora_b = layer.lora_A.detach(), layer.lora_B.detach()
    if world_size() == 1 or dist.get_rank() == source:
        with torch.autocast(layer.packed.device.type, enabled=False):
            weight = dense.to(layer.packed.device)
            lora_a, lora_b = starts.calibrated(weight, layer.packed_weight, input_rms, layer.config, layer.full_name)
    if world_size() > 1:
        lora_a, lora_b = lora_a.contiguous(), lora_b.contiguous()
        dist.broadcast(lora_a, source)
        dist.broadcast(lora_b, source)
    layer.set_adapter(lora_a, lora_b)


def calibration_of(root: nn.Module | None) -> Calibration | None:
    """The calibration that a converted module waits for, or went through."""
    return None if root is None else vars(root).get("_qlora_calibration")


def _after_load(root: nn.Module, _: Any) -> None:
    """Adapters that come from a checkpoint have started; those of a checkpoint from before any start still wait."""
    calibration = calibration_of(root)
    if calibration is not None and calibration.report.waiting:
        layers = adapted_layers(root).values()
        if any(layer.input_rms is not None or bool(layer.lora_B.any()) for layer in layers):
            calibration.close()
