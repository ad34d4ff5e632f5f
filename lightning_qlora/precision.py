"""QLoRAPrecision: the plugin. Each hook is a few lines that call the room which does the work."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.fabric.plugins.precision.precision import Precision as FabricPrecision
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qlora import guards, seams
from lightning_qlora.calibration import Calibration, calibration_of
from lightning_qlora.checkpointing import transformers_layers
from lightning_qlora.config import Checkpoint, ComputeDtype, InitLoRAWeights, QLoRAConfig, QuantType
from lightning_qlora.convert import convert_module, has_meta, is_converted
from lightning_qlora.early_optimizer import give_adapters
from lightning_qlora.kernels import scratch
from lightning_qlora.linear import QLoRALinear, adapted_layers
from lightning_qlora.loading import quantize_while_loading
from lightning_qlora.paging import Pager
from lightning_qlora.random_state import random_state, set_random_state
from lightning_qlora.report import ConversionReport
from lightning_qlora.sharding import check_shards, converted_before_sharding

seams.restore_checkpoint_after_conversion()
seams.introduce_the_trainer()
seams.load_whole_states_of_sharded_modules()


class QLoRAPrecision(Precision):
    """QLoRA in one argument: `Trainer(plugins=QLoRAPrecision())`, or the same object in `Fabric(plugins=...)`.

    The linear layers of the module are frozen in 4 bits and each gets a LoRA adapter, which alone trains (Dettmers et
    al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023). The defaults are the paper's recipe.

    Args:
        quant_type: 4-bit data type of the frozen weights.
        double_quant: Quantize the block scales again, to 8 bits.
        block_size: Weights that share one scale: a power of two from 32 to 4096.
        compute_dtype: Type the weights are decoded to for each product; "auto" is that of the weight which was
            replaced, and bf16 instead of fp32 on a GPU that has bf16.
        r: Rank of the adapters.
        lora_alpha: The adapter's product is scaled by lora_alpha / r.
        lora_dropout: Probability of dropping an input of an adapter in training.
        target_modules: Layers to convert: "all-linear", a regular expression for the whole name, or a list of name
            endings.
        exclude_modules: Layers to leave alone: a regular expression or a list of name endings.
        modules_to_save: Modules to train in full beside the adapters: a list of name endings.
        init_lora_weights: Where the adapters start: "default" (PEFT's: B = 0), "gaussian" (B = 0), "loftq", "pissa",
            "pissa_niter_16" (with 16 power iterations, faster), or "calibrated" on the first training batches.
        loftq_config: For "loftq", as in PEFT, and for "pissa": {"loftq_iter": 5} for 5 iterations instead of 1.
        calibration_batches: For "calibrated": batches to look at before the first step; None: those of the first step.
        use_rslora: Scale by lora_alpha / sqrt(r) instead.
        use_dora: Learn the magnitude of every output row as well (weight-decomposed LoRA).
        rank_pattern: Rank of single layers, {name ending or regular expression: r}, as in PEFT.
        alpha_pattern: lora_alpha of single layers, likewise.
        paged_optimizer: Page optimizer state to host memory: true, false, or "auto" (on for CUDA devices).
        gradient_checkpointing: Recompute activations in the backward pass.
        checkpoint: What a checkpoint holds: the "adapter" and what else trains, or the packed base as well ("full").
        adapter: Folder of a PEFT adapter to start from.

    Attributes:
        config: The arguments, checked.
        pager: Pages the optimizers' state; `pager.report()` says what and how.
        report: What the last conversion did; None before one.

    Raises:
        TypeError, ValueError: If an argument is wrong; the message names it, its value, and what is allowed.
    """

    precision = "32-true"
    restore_after_setup = True  # read by seams.restore_checkpoint_after_conversion

    def __init__(
        self,
        quant_type: QuantType = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        compute_dtype: ComputeDtype = "auto",
        r: int = 64,
        lora_alpha: float = 16,
        lora_dropout: float = 0.05,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        modules_to_save: list[str] | None = None,
        init_lora_weights: InitLoRAWeights = "default",
        loftq_config: dict[str, int] | None = None,
        calibration_batches: int | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        paged_optimizer: bool | Literal["auto"] = "auto",
        gradient_checkpointing: bool = False,
        checkpoint: Checkpoint = "adapter",
        adapter: str | None = None,
    ) -> None:
        self.config = QLoRAConfig(
            quant_type=quant_type,
            double_quant=double_quant,
            block_size=block_size,
            compute_dtype=compute_dtype,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules,
            exclude_modules=[] if exclude_modules is None else exclude_modules,
            modules_to_save=[] if modules_to_save is None else modules_to_save,
            init_lora_weights=init_lora_weights,
            loftq_config={} if loftq_config is None else loftq_config,
            calibration_batches=calibration_batches,
            use_rslora=use_rslora,
            use_dora=use_dora,
            rank_pattern={} if rank_pattern is None else rank_pattern,
            alpha_pattern={} if alpha_pattern is None else alpha_pattern,
            paged_optimizer=paged_optimizer,
            gradient_checkpointing=gradient_checkpointing,
            checkpoint=checkpoint,
            adapter=adapter,
        )
        self.report: ConversionReport | None = None
        self.pager = Pager()
        self._trainer: weakref.ref[Trainer] | None = None
        self._module: weakref.ref[nn.Module] | None = None
        self._layers: list[weakref.ref[QLoRALinear]] = []
        self._mode_before: list[tuple[weakref.ref[nn.Module], bool]] = []
        self._evaluating = False

    @override
    @contextmanager
    def module_init_context(self) -> Iterator[None]:
        """Within `configure_model`, a transformers model is quantized while it is loaded, any before it is sharded."""
        trainer = None if self._trainer is None else self._trainer()
        sharding = converted_before_sharding(trainer, self.config, self.convert_module)
        with quantize_while_loading(self.config), sharding:
            yield

    def before_run(self, trainer: Trainer) -> None:
        """Know the Trainer before `configure_model`; called by `seams.introduce_the_trainer`."""
        self._trainer = weakref.ref(trainer)

    def init(self) -> AbstractContextManager[Any]:
        """The same around a constructor: `with plugin.init(): module = MyModule()`."""
        return self.module_init_context()

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert in place; for a module that is converted already, nothing but the training mode is set."""
        trainer, device = _trainer_of(module), None
        if trainer is not None:
            guards.check_trainer(trainer, module)  # type: ignore[arg-type]
            device = trainer.strategy.root_device
            if has_meta(module):
                seams.let_teardown_pass_by(trainer)
        known = is_converted(module)
        report = convert_module(module, self.config, device)
        if not known:
            rank_zero_only(report.show)()
        if not known or self.report is None:
            self.report = report
        self._module = weakref.ref(module)
        self._layers = [weakref.ref(layer) for layer in adapted_layers(module).values()]
        self._evaluating = trainer is not None and trainer.state.fn != TrainerFn.FITTING
        if trainer is not None:
            check_shards(module)
        if trainer is not None and not self._evaluating:
            self._train_adapters(module)
        return module

    def _train_adapters(self, module: nn.Module) -> None:
        """Put the adapters in training mode: Lightning leaves a module in the mode it came, Hugging Face's in eval."""
        recomputed = transformers_layers(module) if self.config.gradient_checkpointing else ()
        for layer in (*self._held_layers(), *recomputed):
            self._mode_before.append((weakref.ref(layer), layer.training))
            layer.training = True

    def _held_layers(self) -> list[QLoRALinear]:
        return [layer for reference in self._layers if (layer := reference()) is not None]

    @property
    def _calibration(self) -> Calibration | None:
        return None if self._module is None else calibration_of(self._module())

    @override
    def convert_input(self, data: Any) -> Any:
        """Where the adapters start from data: let them see the Trainer's batch before anything trains on it."""
        if self._calibration is not None and self._module is not None:
            trainer = _trainer_of(self._module())
            if trainer is not None:
                self._calibration.before_batch(trainer, data)
        return super().convert_input(data)

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast, where fp32 weights are computed in 16 bit: so the layers between ours run in 16 bit as well."""
        layer = next(iter(self._held_layers()), None)
        if layer is None or layer.weight_dtype is not torch.float32:
            return nullcontext()
        dtype = layer.compute_dtype(layer.packed)
        return nullcontext() if dtype is torch.float32 else torch.autocast(layer.packed.device.type, dtype)

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Check the Trainer's optimizers and page their state, before that is restored."""
        layers = {layer.full_name: layer for layer in self._held_layers()}
        for optimizer in optimizers:
            give_adapters(optimizer, layers)
            self._take(optimizer)
        return super().connect(model, optimizers, lr_schedulers)

    def _take(self, optimizer: Optimizer) -> None:
        guards.check_optimizer(optimizer)
        if self.config.paged_optimizer:  # "auto" as True: on a CPU there is nothing to page
            self.pager.attach(optimizer)

    @override
    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        """Lightning's own, of the Trainer or of Fabric."""
        return _kind(module).pre_backward(self, tensor, module)

    @override
    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Lightning's own, of the Trainer or of Fabric."""
        _kind(model).backward(self, tensor, model, *args, **kwargs)

    @override
    def post_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        """Lightning's own, of the Trainer or of Fabric."""
        return _kind(module).post_backward(self, tensor, module)

    @override
    def optimizer_step(  # type: ignore[override]
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        closure: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Lightning's own, of the Trainer (which passes the model) or of Fabric (which doesn't)."""
        if model is not None:
            return Precision.optimizer_step(self, optimizer, model=model, closure=closure, **kwargs)  # type: ignore[arg-type]
        self._take(optimizer)
        if self._calibration is not None and closure is None:
            self._calibration.before_step(optimizer)
        if closure is not None:
            kwargs["closure"] = closure
        return FabricPrecision.optimizer_step(self, optimizer, **kwargs)

    @override
    def _after_closure(self, model: LightningModule, optimizer: Any) -> None:
        """Between the Trainer's backward pass and its step: adapters that start from data must have started."""
        if self._calibration is not None:
            self._calibration.before_step(optimizer)
        super()._after_closure(model, optimizer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The random generators, which dropout masks come from."""
        return {"random_state": random_state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the generators back, so that training goes on with the masks it would have had."""
        if not self._evaluating:
            set_random_state(state_dict["random_state"])

    @override
    def teardown(self) -> None:
        """Leave the module in the mode it came in; free the pages of the optimizers and the decode buffers."""
        for reference, mode in reversed(self._mode_before):  # as it was before the first conversion of this run
            if (layer := reference()) is not None:
                layer.training = mode
        self._mode_before = []
        self.pager.close()
        scratch.release()


def _trainer_of(module: nn.Module | None) -> Trainer | None:
    """The Trainer a module is attached to; None in Fabric."""
    return module._trainer if isinstance(module, LightningModule) else None


def _kind(module: nn.Module | None) -> type[Any]:
    return FabricPrecision if _trainer_of(module) is None else Precision
