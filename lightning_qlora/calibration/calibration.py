"""The start that waits for data: adapters of a "calibrated" module start when its first training batch comes.

Two ways to see that batch before anything trains on it, both without a trace (`undisturbed`):
    the first forward pass   run once to look, then as it was called: any loop, and the Trainer where one batch makes a
                             step. Nothing but the forward pass itself is run twice.
    the first batches        where several make the first step, `calibration_batches` asks for them, ranks must look
                             together, or the model is compiled: the Trainer's next batches go through training_step,
                             muted, and stay in line.
Gradients are on while it looks, as in the pass that counts, for code that asks for them; the graph is thrown away.
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

from lightning_qlora import seams, starts
from lightning_qlora.calibration.input_sizes import InputSizes
from lightning_qlora.calibration.report import CalibrationReport
from lightning_qlora.calibration.undisturbed import map_kept, undisturbed
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.linear import QLoRALinear, adapted_layers
from lightning_qlora.random_state import world_size
from lightning_qlora.sharded import is_sharded


class Calibration:
    """Sees a converted module's first training batch and starts its adapters from it.

    Attributes:
        report: What became of them so far.
    """

    def __init__(self, root: nn.Module, config: QLoRAConfig) -> None:
        self._config, self._looking, self._said, self._warned = config, False, False, False
        self._layers = {name: layer for name, layer in adapted_layers(root).items() if layer.dense_weight is not None}
        sizes = (layer.dense_weight.nbytes for layer in self._layers.values() if layer.dense_weight is not None)
        self.report = CalibrationReport(list(self._layers), sum(sizes))
        # Name -> A, B, input sizes, in host memory until a checkpoint holds what came of them.
        self._starts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._hooks = [
            (module, module.register_forward_pre_hook(self._before_forward, with_kwargs=True))
            for module in root.modules()
            if adapted_layers(module)
        ]
        root._qlora_calibration = self  # type: ignore[assignment]
        root.register_state_dict_post_hook(_after_save)  # type: ignore[no-untyped-call]
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
        """Look at this batch of the Trainer and those that come after it, where a forward pass alone won't do."""
        module = trainer.lightning_module
        if not (self.report.waiting and trainer.training and module.automatic_optimization) or self._looking:
            return
        index = trainer.fit_loop.epoch_loop.batch_idx + 1
        asked = self._config.calibration_batches or trainer.accumulate_grad_batches
        count = int(min(asked, trainer.num_training_batches - index))
        if count > 1 or world_size() > 1 or any(_is_compiled(part) for part in module.modules()):
            batches = map_kept(seams.batches_from(trainer, batch, count))
            with torch.compiler.set_stance("force_eager"):
                self.look(module, lambda: seams.rehearse(trainer, batches, index))

    def look(self, module: nn.Module, run: Callable[[], Any], *arguments: Any) -> None:
        """Run without a trace, then start the layers of the module that still wait.

        Args:
            module: The module that `run` runs.
            run: Feeds it training data.
            *arguments: What `run` feeds, to be left as it is.
        """
        layers, began = self._waiting_in(module), perf_counter()
        sizes = InputSizes(layers)
        self._looking = True
        try:
            with seams.nothing_logged(module), undisturbed(module, *arguments), sizes.observed():
                run()
        finally:
            self._looking = False
        sizes.sum_over_ranks()
        seen = {name: sizes.rms(name) for name in layers}  # all of them, before any starts: an error changes nothing
        for place, (name, rms) in enumerate(seen.items()):
            self._start(name, rms, source=place % world_size())
            self.report.rows = max(self.report.rows, sizes.rows(name))
        self.report.seconds += perf_counter() - began
        self._let_go()

    def _start(self, name: str, rms: Tensor, source: int) -> None:
        layer = self._layers[name]
        self.report.waiting.remove(name)
        if layer.lora_B.any():
            layer.dense_weight = None
            self._warn(f"{name} was trained before it could start from data (in eval mode?), and is left as it is")
            return
        start_from(layer, rms, source)
        if rms.any():
            self.report.calibrated.append(name)
            self._starts[name] = layer.lora_A.detach().cpu().clone(), layer.lora_B.detach().cpu().clone(), rms.cpu()
        else:
            self.report.unseen.append(name)

    def before_step(self, optimizer: Optimizer) -> None:
        """Refuse a step that would train adapters before they have started; say, once, what still waits.

        Raises:
            RuntimeError: As above.
        """
        if not self.report.waiting:
            return
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, layer in self._waiting_in(None).items():
            if id(layer.lora_B) in mine and layer.lora_B.grad is not None and layer.lora_B.grad.any():
                raise RuntimeError(
                    f"init_lora_weights='calibrated': the optimizer steps before the adapter of {name} has started. It "
                    "starts in the first forward pass in training mode: call model.train(), and run the model itself "
                    "(its forward)."
                )
        self._say()

    def close(self) -> None:
        """Let go of the dense weights and the starts: nothing waits any more."""
        self.report.waiting.clear()
        self._starts.clear()
        for layer in self._layers.values():
            if isinstance(layer, QLoRALinear):  # and was not merged
                layer.dense_weight = None
        self._let_go()

    def loaded(self, config: QLoRAConfig) -> None:
        """Take up, layer by layer, what a checkpoint brought: started, not yet started, or started some other way."""
        if config.start != "calibrated":
            self.close()
        for name, layer in self._layers.items():
            if not isinstance(layer, QLoRALinear):
                continue
            if layer.input_rms is not None or layer.lora_B.any():
                layer.dense_weight = None
                self._starts.pop(name, None)
                if name in self.report.waiting:
                    self.report.waiting.remove(name)
            elif name in self._starts:  # a state from before the start: back to the start
                lora_a, lora_b, layer.input_rms = self._starts[name]
                layer.set_adapter(lora_a, lora_b)
            elif name not in self.report.waiting and name in self.report.calibrated:
                self._warn(
                    f"the state that was loaded is from before the start, and the dense weights are gone: {name} now "
                    "starts as by default. Load it into a newly made module instead"
                )
        self._let_go()

    def saved(self) -> None:
        """A checkpoint holds the started adapters: nobody will ask for their start again."""
        self._starts.clear()

    def _let_go(self) -> None:
        """Remove the hooks of modules in which nothing waits, so that torch.compile traces through them."""
        waiting = {id(layer) for layer in self._waiting_in(None).values()}
        kept = []
        for module, hook in self._hooks:
            if waiting.isdisjoint(map(id, module.modules())):
                hook.remove()
            else:
                kept.append((module, hook))
        self._hooks = kept
        if not self.report.waiting:
            self._say()

    def _say(self) -> None:
        """Tell, once, what has started and what has not."""
        if self.report.calibrated and not self._said:
            self._said = True
            rank_zero_info(f"QLoRA: {self.report}")

    def _waiting_in(self, module: nn.Module | None) -> Mapping[str, QLoRALinear]:
        """Name -> layer that waits, in the module or anywhere."""
        inside = None if module is None else {id(part) for part in module.modules()}
        waiting = {name: self._layers[name] for name in self.report.waiting}
        return {
            name: layer
            for name, layer in waiting.items()
            if isinstance(layer, QLoRALinear) and (inside is None or id(layer) in inside)  # and not merged since
        }

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
    if is_sharded(layer.lora_A):
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


def close_calibrations(module: nn.Module) -> None:
    """Let every calibration of a module or its parts go: what its adapters are comes from elsewhere now."""
    for part in module.modules():
        calibration = calibration_of(part)
        if calibration is not None:
            calibration.close()


def _after_save(root: nn.Module, *_: Any) -> None:
    calibration = calibration_of(root)
    if calibration is not None:
        calibration.saved()


def _after_load(root: nn.Module, _: Any) -> None:
    calibration = calibration_of(root)
    if calibration is not None:
        calibration.loaded(root._qlora_config)  # type: ignore[arg-type]


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
