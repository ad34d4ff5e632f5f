"""QLoRAPrecision: the plugin for Trainer and Fabric. Each hook calls the module that implements it."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins.precision.precision import Precision as FabricPrecision
from lightning.fabric.utilities import rank_zero_warn
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qlora.adapters.conversion import CONVERSION, conversion_of, forget_conversion, text_of, was_merged
from lightning_qlora.config import QLoRAConfig, takes_arguments_of
from lightning_qlora.huggingface.quantize_on_load import quantize_while_loading
from lightning_qlora.kernels import scratch
from lightning_qlora.kernels.backends import agree, describe
from lightning_qlora.layers.changes import make_changes
from lightning_qlora.layers.dtensor import clip_grad_norm, of_all_ranks
from lightning_qlora.layers.full_precision import compute_in, full_precision_parameters
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.names import last_part, owner_name, without_wrappers
from lightning_qlora.layers.packed_linear import to_parameters
from lightning_qlora.layers.qlora_linear import use_base_of_rank_0
from lightning_qlora.layers.slow_types import reason_for_fp32
from lightning_qlora.lightning_copies import classes, inherit_from_copies, modules
from lightning_qlora.optim.pager import Pager
from lightning_qlora.training import guards, patches
from lightning_qlora.training.calibration import (
    after_closure,
    calibrate_before_closure,
    calibrate_before_step,
    step_of_all_ranks,
)
from lightning_qlora.training.checkpoint import set_torch_rng_state_of_rank, torch_rng_states
from lightning_qlora.training.convert import convert_module, finish_sharded, is_converted
from lightning_qlora.training.optimizers import (
    audit_first_step,
    check_loss,
    check_optimizer,
    leave_out_bytes,
    replace_parameters_by_adapters,
    warn_of_adapters_in_no_optimizer,
)
from lightning_qlora.training.report import ConversionReport
from lightning_qlora.training.thawed import warn_of_thawed


@dataclass
class _Converted:
    """A module that the plugin converted."""

    report: ConversionReport
    trains_fp32: bool  # whether parameters train in it that compute in fp32
    trained: set[int] = field(default_factory=set)  # ids of the parameters that took a step


@inherit_from_copies
class QLoRAPrecision(Precision):
    """QLoRA in one argument: `Trainer(plugins=QLoRAPrecision())`, or the same object in `Fabric(plugins=...)`.

    The linear layers of the module are frozen in 4 bits, and each gets a LoRA adapter (Dettmers et al., "QLoRA:
    Efficient Finetuning of Quantized LLMs", NeurIPS 2023). The adapters train. Parts without pretrained values, such as
    a new head, train in full. The arguments are those of `QLoRAConfig`; `__init__` has their descriptions.

    Attributes:
        config: The arguments, checked.
        pager: Pages the optimizers' state; `pager.report()` lists the pages and how they are moved.
        report: The report of the last conversion; None before the first one.

    Raises:
        TypeError, ValueError: If an argument is wrong; the message names it, its value, and what is allowed.
    """

    precision = "32-true"

    @takes_arguments_of(QLoRAConfig)
    def __init__(self, config: QLoRAConfig) -> None:
        inherit_from_copies(QLoRAPrecision)
        make_changes("lightning", "torch")  # in copies of Lightning that were loaded since
        self.config = config
        self.report: ConversionReport | None = None
        self.pager = Pager()
        self._trainer: Trainer | None = None  # only within configure_model
        self._module: weakref.ref[nn.Module] | None = None
        self._converted: weakref.WeakKeyDictionary[nn.Module, _Converted] = weakref.WeakKeyDictionary()
        self._agreed: set[torch.device] = set()  # on which the ranks compared their kernels
        self._mode_before: dict[nn.Module, bool] = {}
        self._evaluating = False
        self._has_batches = False

    def __repr__(self) -> str:
        return repr(self.config).replace(type(self.config).__name__, type(self).__name__, 1)

    def __getstate__(self) -> dict[str, Any]:
        """Without the weak references to modules, so that a Trainer that ran can be pickled."""
        return {**vars(self), "_module": None, "_converted": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _converted=weakref.WeakKeyDictionary())

    @override
    @contextmanager
    def module_init_context(self) -> Iterator[None]:
        """Within this (`configure_model`), transformers models are quantized while they load."""
        trainer = self._trainer
        shards = _shards_module(trainer)
        with quantize_while_loading(self.config, shards):
            yield
        if trainer is not None and shards:
            finish_sharded(trainer.lightning_module, self.config)

    @contextmanager
    def convert_for_trainer(self, trainer: Trainer) -> Iterator[None]:
        """Within this (`configure_model`), the Trainer is known; then convert, if a checkpoint is restored next.

        `patches.convert_before_checkpoint_is_restored` calls it.
        """
        self._trainer = trainer
        try:
            yield
        finally:
            self._trainer = None
        if not trainer.strategy.restore_checkpoint_after_setup:
            self.convert_module(trainer.lightning_module)

    def init(self) -> AbstractContextManager[Any]:
        """The context of `configure_model`, for a constructor: `with plugin.init(): module = MyModule()`."""
        return self.module_init_context()

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the module in place. If it is converted already, only its training mode is set.

        A module whose adapters were merged stays dense in a run that only evaluates it.

        In `configure_model`, call `self.trainer.precision_plugin.convert_module(self.model)` before `fully_shard` or
        `parallelize_module`. It converts the whole LightningModule, also if it gets a part of it.
        """
        trainer = _trainer_of(module) or self._trainer
        root = module
        if self._trainer is not None and any(part is module for part in self._trainer.lightning_module.modules()):
            root = self._trainer.lightning_module
        device = None
        if trainer is not None:
            guards.check_trainer(trainer, trainer.lightning_module)
            device = trainer.strategy.root_device
        self._evaluating = trainer is not None and trainer.state.fn != TrainerFn.FITTING
        if was_merged(root):
            if self._evaluating:
                return module
            rank_zero_warn(
                f"The adapters of this {type(root).__name__} were merged, and its weights are quantized again now, to "
                "train new adapters. To compute with the merged weights alone, leave out plugins=QLoRAPrecision(...)."
            )
        converted_before = is_converted(root)
        shards = _shards_module(trainer)
        report = convert_module(root, self.config, device, shards, None, self._evaluating, _reason_of_all_ranks)
        if shards:
            to_parameters(root)
        else:
            use_base_of_rank_0(root)
        if device is not None:
            self._agree(device)  # in Fabric the module is moved later
        if not converted_before:
            rank_zero_only(print)(report)
        previous = self._converted.get(root)
        if converted_before and previous is not None:
            report = previous.report
        self.report = report
        self._module = weakref.ref(root)
        self._converted[root] = _Converted(report, self._trains_new_fp32_parts(root))
        if trainer is not None:
            guards.check_fsdp_groups(root)
            patches.requeue_between_batches(trainer)
            if not self._evaluating:
                self._use_training_mode()
        return module

    def _agree(self, device: torch.device) -> None:
        """Let the ranks compute with the same kernels on a device, once; all of them must call it."""
        if device not in self._agreed:
            self._agreed.add(device)
            agree(device)

    def _trains_new_fp32_parts(self, root: nn.Module) -> bool:
        """Whether parameters train in fp32 that are neither adapters nor computed in 16 bits."""
        in_16_bits = {id(parameter) for layer in self._layers() for parameter in layer.adapter_parameters()}
        in_16_bits |= {id(parameter) for _, parameter, _ in full_precision_parameters(root)}
        trained = (parameter for parameter in root.parameters() if parameter.requires_grad)
        return any(parameter.dtype is torch.float32 and id(parameter) not in in_16_bits for parameter in trained)

    def _use_training_mode(self) -> None:
        """Let the adapters be in training mode: transformers loads in eval mode, which Lightning keeps."""
        for layer in self._layers():
            self._mode_before.setdefault(layer, layer.training)
            layer.training = True

    def convert_again(self, module: nn.Module, state_dict: Mapping[str, Any]) -> None:
        """Convert layers that replaced converted ones, if a state dict has adapters for them."""
        adapters = {without_wrappers(owner_name(key)) for key in state_dict if last_part(key) == "lora_A"}
        layers = {without_wrappers(name) for name, part in module.named_modules() if isinstance(part, LoRALayer)}
        if conversion_of(module) is not None and not adapters <= layers:
            forget_conversion(module)
            self.convert_module(module)

    def _kernels(self) -> str | None:
        """What computes the layers; None before conversion."""
        layer = next(self._layers(), None)
        if layer is None:
            return None
        return describe(layer.packed.device)

    @property
    def _root(self) -> nn.Module | None:
        """The module that was converted last; it is not kept alive."""
        return None if self._module is None else self._module()

    def _layers(self) -> Iterator[LoRALayer]:
        root = self._root
        if root is not None:
            yield from (part for part in root.modules() if isinstance(part, LoRALayer))

    @override
    def convert_input(self, data: Any) -> Any:
        """Before the first batch of a Trainer compare the ranks."""
        trainer = _trainer_of(self._root)
        if trainer is not None and trainer.training and not self._has_batches:
            guards.check_equal_batches(trainer)
            self._has_batches = True
        return super().convert_input(data)

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast, if the module has fp32 weights and computes in bf16, so that all layers compute in bf16.

        The fp32 weights are those of the layers before conversion, or new parts beside a model in 16 bit. Of several
        modules in Fabric, which does not say whose context this is, each enters its own where they differ. Not in fp16:
        4-bit layers have a power of two there, and the products of other layers could overflow.
        """
        dtypes = {root: _autocast_dtype(root, each.trains_fp32) for root, each in self._converted.items()}
        if _trainer_of(self._root) is not None:  # others were of earlier Trainers
            dtypes = {root: dtype for root, dtype in dtypes.items() if root is self._root}
        if len({*dtypes.values()}) > 1:
            for root, dtype in dtypes.items():
                if dtype is not None:
                    compute_in(root, dtype)
            return nullcontext()
        dtype = next(iter(dtypes.values()), None)
        if dtype is None:
            return nullcontext()
        return torch.autocast(next(self._layers()).packed.device.type, dtype)

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Check the Trainer's optimizers and page their state; a checkpoint restores the state after this."""
        for optimizer in optimizers:
            self.on_setup_optimizer(optimizer)
        module = self._root  # `model` may be DDP's wrapper
        if module is not None and self.report is not None and not self._evaluating:
            warn_of_adapters_in_no_optimizer(module, optimizers)
            guards.check_state_dict(module)
        return super().connect(model, optimizers, lr_schedulers)

    def _audit(self, optimizer: Optimizer) -> None:
        """Check, between a backward pass and the step, that the adapters have gradients."""
        for module, converted in self._converted.items():  # of a GAN in Fabric there are two
            audit_first_step(optimizer, module, converted.report.unused)
            warn_of_thawed(module, optimizer, converted.trained)

    def _before_step(self, optimizer: Optimizer) -> None:
        """What Fabric does between a backward pass and the step; for the Trainer see `_after_closure`."""
        self._audit(optimizer)
        calibrate_before_step(optimizer)

    def on_setup_optimizer(self, optimizer: Optimizer) -> None:
        """Let an optimizer that was made before conversion hold the adapters, check it, and page its state.

        Fabric calls this in `setup` and `setup_optimizers`; see `optim.patches.call_on_setup_optimizer`.
        """
        replace_parameters_by_adapters(optimizer)
        leave_out_bytes(optimizer)
        check_optimizer(optimizer)
        layer = next(self._layers(), None)
        if layer is not None:
            self._agree(layer.packed.device)
        if self.config.paged_optimizer:  # "auto" is True here: the pager does nothing on a CPU
            self.pager.attach(optimizer)

    @override
    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        check_loss(tensor)
        return _precision_class(module).pre_backward(self, tensor, module)

    @override
    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        _precision_class(model).backward(self, tensor, model, *args, **kwargs)

    @override
    def post_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        return _precision_class(module).post_backward(self, tensor, module)

    @override
    @step_of_all_ranks()
    def optimizer_step(  # type: ignore[override]
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        closure: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """See Precision of lightning.pytorch (the Trainer passes the model) or lightning.fabric (it does not)."""
        if model is None:
            self.on_setup_optimizer(optimizer)
        if closure is not None and not _runs_backward(model, closure):
            calibrate_before_closure(optimizer)
        if model is not None:
            return Precision.optimizer_step(self, optimizer, model=model, closure=closure, **kwargs)  # type: ignore[arg-type]
        if closure is None:
            self._before_step(optimizer)
        else:
            kwargs["closure"] = after_closure(closure, partial(self._before_step, optimizer))
        return FabricPrecision.optimizer_step(self, optimizer, **kwargs)

    @override
    def _after_closure(self, model: LightningModule, optimizer: Any) -> None:
        """See `_before_step`; the Trainer calls this between its backward pass and its step."""
        self._audit(optimizer)
        super()._after_closure(model, optimizer)
        calibrate_before_step(optimizer)

    @override
    def _clip_gradients(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """See Precision; it clips only for a LightningModule of its own package."""
        _precision_class(model)._clip_gradients(self, model, *args, **kwargs)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """See Precision; also where a plan splits some of the adapters, and others are whole.

        In Fabric call `clip_gradients` of the plugin there: `fabric.clip_gradients` clips by torch's function.
        """
        clip_grad_norm(self.main_params(optimizer), clip_val)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The states of torch's random generators, which draw dropout masks, and what computes the layers."""
        trainer = _trainer_of(self._root)
        after_error = trainer is not None and trainer.interrupted
        state: dict[str, Any] = {
            "random_state": torch_rng_states(gathered=not after_error),
            "kernels": self._kernels(),
        }
        return state

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Copy the conversion from the module's state, for a module whose `on_save_checkpoint` leaves it out there."""
        entry = checkpoint["state_dict"].get(CONVERSION)
        if entry is not None:
            checkpoint[type(self).__qualname__][CONVERSION] = text_of(entry)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the random generators, so that a resumed run draws the same dropout masks."""
        if self._evaluating:
            return
        saved = state_dict.get("kernels")
        here = self._kernels()
        if None not in (saved, here) and saved != here:
            rank_zero_warn(
                f"The checkpoint was trained with {saved}, and this run computes with {here}: it goes on with the same "
                "state, but its results differ from those of an uninterrupted run in their last bits."
            )
        set_torch_rng_state_of_rank(state_dict["random_state"])

    @override
    def teardown(self) -> None:
        """Restore the training mode of the layers; free the pages of the optimizers and the decode buffers."""
        for layer, mode in self._mode_before.items():
            layer.training = mode
        self._mode_before.clear()
        self._has_batches = False
        self.pager.close()
        scratch.release()


def _autocast_dtype(root: nn.Module, trains_fp32: bool) -> torch.dtype | None:
    """The type that a module with fp32 weights computes in under autocast; None: without."""
    layer = next((part for part in root.modules() if isinstance(part, LoRALayer)), None)
    if layer is None or (layer.weight_dtype is not torch.float32 and not trains_fp32):
        return None
    dtype = layer.compute_dtype(layer.packed)
    return dtype if dtype is torch.bfloat16 else None


def _reason_of_all_ranks(device: torch.device, dtype: torch.dtype) -> str | None:
    """`reason_for_fp32`, the same on all ranks, which may run on different machines; all must call it."""
    return next(filter(None, of_all_ranks(reason_for_fp32(device, dtype))), None)


def _trainer_of(module: nn.Module | None) -> Trainer | None:
    """The Trainer a module is attached to; None in Fabric."""
    return module._trainer if isinstance(module, classes(LightningModule)) else None


def _runs_backward(model: nn.Module | None, closure: Callable[[], Any]) -> bool:
    """Whether a closure is the Trainer's: it has the backward pass, or in manual optimization nothing."""
    if model is None:
        return False
    empty = [module.do_nothing_closure for module in modules(do_nothing_closure.__module__)]
    return bool(model.automatic_optimization) or closure in empty


def _shards_module(trainer: Trainer | None) -> bool:
    """Whether the strategy of a Trainer shards the parameters (FSDP2 or tensor parallelism)."""
    return trainer is not None and isinstance(trainer.strategy, classes(ModelParallelStrategy))


def _precision_class(module: nn.Module | None) -> type[Any]:
    """Fabric's class, or the Trainer's of the package that the module is from."""
    if _trainer_of(module) is None:
        return FabricPrecision
    pairs = zip(classes(LightningModule), classes(Precision), strict=True)
    return next(precision for kind, precision in pairs if isinstance(module, kind))


make_changes("lightning", "torch")
