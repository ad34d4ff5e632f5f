"""QLoRAPrecision: the plugin for Trainer and Fabric. Each hook calls the module that implements it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Never, Unpack, override

from lightning_qlora.arguments import QLoRAArguments, shows_arguments
from lightning_qlora.checkpoints.run_state import (
    begin_epoch_of_checkpoint,
    set_torch_rng_state_of_rank,
    torch_rng_states,
)
from lightning_qlora.checkpoints.saved_conversion import text_of
from lightning_qlora.checks import KEEP_DENSE
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.conversion.convert import Run, convert_module, is_converted
from lightning_qlora.conversion.convert_checks import LOAD_IN_CONFIGURE_MODEL, check_has_data
from lightning_qlora.conversion.report import ConversionReport
from lightning_qlora.huggingface.quantize_on_load import quantize_while_loading
from lightning_qlora.kernels import scratch
from lightning_qlora.kernels.backends import agree
from lightning_qlora.layers.packed_layer import to_parameters
from lightning_qlora.lightning_copies import classes, inherit_from_copies
from lightning_qlora.optim.optimizer_parameters import (
    adapters_in_no_optimizer,
    check_loss,
    check_optimizer,
    leave_out_bytes,
    replace_merged_adapters,
    replace_parameters_by_adapters,
)
from lightning_qlora.optim.pager import Pager
from lightning_qlora.plugin.converted_modules import ConvertedModules
from lightning_qlora.plugin.trainer_or_fabric import TrainerOrFabricPrecision, trainer_of
from lightning_qlora.runs import guards
from lightning_qlora.runs.same_base import check_same_base
from lightning_qlora.survey.provenance import Origins
from lightning_qlora.survey.records import CONVERSION, was_merged
from lightning_qlora.tensors.device_types import Held, held_type
from lightning_qlora.tensors.dtensor import clip_grad_norm, of_all_ranks
from lightning_qlora.upstream_changes import make_changes

IN_NO_OPTIMIZER = (
    f"adapters are in no optimizer, so they do not train: pass self.parameters() to the optimizer, or {KEEP_DENSE}. A "
    "target that follows another module by an average of parameters: name both in modules_to_save"
)
MERGED_BEFORE = (
    "its adapters were merged, and its weights are quantized again, to train new ones: to compute with the merged "
    "weights alone, leave out plugins=QLoRAPrecision(...)"
)


@inherit_from_copies
class QLoRAPrecision(TrainerOrFabricPrecision):
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

    Example:
        ```python
        from lightning.pytorch import Trainer
        from lightning_qlora import QLoRAPrecision
        from my_module import MyModule, data

        plugin = QLoRAPrecision(r=16, target_modules="all-linear")
        Trainer(max_epochs=1, plugins=plugin).fit(MyModule(), data)
        print(plugin.report.trainable_parameters)
        ```
    """

    precision = "32-true"

    @shows_arguments
    def __init__(self, *unnamed: Never, **arguments: Unpack[QLoRAArguments]) -> None:
        inherit_from_copies(QLoRAPrecision)
        make_changes("lightning", "torch")  # in copies of Lightning that were loaded since
        self.config = QLoRAConfig(*unnamed, **arguments)  # type: ignore[arg-type]  # takes a torch.dtype, too
        self.report: ConversionReport | None = None
        self.pager = Pager()
        self._trainer: Trainer | None = None  # only within configure_model
        self._runs: list[Trainer] = []  # of a run in a callback of another one, the inner one is the last
        self._modules = ConvertedModules()
        self._agreed: set[torch.device] = set()  # on which the ranks compared their kernels
        self._mode_before: dict[nn.Module, bool] = {}
        self._evaluating = False
        self._random_state: list[dict[str, Any]] | None = None  # of a checkpoint, until its epoch goes on

    def __repr__(self) -> str:
        return type(self).__name__ + repr(self.config).removeprefix(type(self.config).__name__)

    @override
    @contextmanager
    def module_init_context(self) -> Iterator[None]:
        """Within this (`configure_model`), transformers models are quantized while they load."""
        trainer = self._trainer
        shards = _shards_module(trainer)
        with quantize_while_loading(self.config, shards):
            yield
        if trainer is not None and shards:
            check_has_data(trainer.lightning_module.named_modules(), advice=LOAD_IN_CONFIGURE_MODEL)

    @contextmanager
    def _convert_for_trainer(self, trainer: Trainer) -> Iterator[None]:
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
        trainer = trainer_of(module) or self._trainer
        root = module
        if self._trainer is not None and any(part is module for part in self._trainer.lightning_module.modules()):
            root = self._trainer.lightning_module
        self._evaluating = trainer is not None and trainer.state.fn != TrainerFn.FITTING
        run = Run(None, False, self._evaluating, _held_on_all_ranks, trainer is None, _of_rank_0)
        if trainer is not None:
            if trainer not in self._runs:
                self._runs.append(trainer)
            guards.check_trainer(trainer, trainer.lightning_module)
            run = run._replace(device=trainer.strategy.root_device, sharded=_shards_module(trainer))
        merged = was_merged(root)
        if merged and self._evaluating:
            return module
        again = is_converted(root)
        report = convert_module(root, self.config, run)
        if merged:
            report.note(MERGED_BEFORE)
        if run.sharded:
            to_parameters(root)
        else:
            check_same_base(root)
        if run.device is not None:
            self._agree(run.device)  # in Fabric the module is moved later
        if not again:
            rank_zero_only(print)(report)
        self.report = self._modules.add(root, report, again)
        if trainer is not None and not self._evaluating:
            self._use_training_mode()
        return module

    def _agree(self, device: torch.device) -> None:
        """Let the ranks compute with the same kernels on a device, once; all of them must call it."""
        if device not in self._agreed:
            self._agreed.add(device)
            agree(device)

    def _use_training_mode(self) -> None:
        """Let the adapters be in training mode: transformers loads in eval mode, which Lightning keeps."""
        for layer in self._modules.layers():
            self._mode_before.setdefault(layer, layer.training)
            layer.training = True

    @override
    def forward_context(self) -> AbstractContextManager[Any]:
        """See `ConvertedModules.autocast`."""
        return self._modules.autocast(last_alone=trainer_of(self._modules.last) is not None)

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Check the Trainer's optimizers and page their state; a checkpoint restores the state after this."""
        for optimizer in optimizers:
            self._on_setup_optimizer(optimizer)
        module = self._modules.last  # `model` may be DDP's wrapper
        if module is not None and not self._evaluating:
            assert self.report is not None
            self.report.tell(IN_NO_OPTIMIZER, adapters_in_no_optimizer(module, optimizers))
        return super().connect(model, optimizers, lr_schedulers)

    def _on_setup_optimizer(self, optimizer: Optimizer) -> None:
        """Let an optimizer that was made before conversion hold the adapters, check it, and page its state.

        Fabric calls this in `setup` and `setup_optimizers`; see `optim.patches.call_on_setup_optimizer`.
        """
        replace_parameters_by_adapters(optimizer)
        leave_out_bytes(optimizer)
        check_optimizer(optimizer)
        layer = next(self._modules.layers(), None)
        if layer is not None:
            self._agree(layer.packed.device)
        if self.config.paged_optimizer:  # "auto" is True here: the pager does nothing on a CPU
            self.pager.attach(optimizer)

    @override
    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        check_loss(tensor)
        return super().pre_backward(tensor, module)

    @override
    def optimizer_step(self, optimizer: Optimizer, model: nn.Module | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """See `TrainerOrFabricPrecision`; an optimizer that Fabric did not set up is set up now."""
        replace_merged_adapters(optimizer)
        if model is None:
            self._on_setup_optimizer(optimizer)
        return super().optimizer_step(optimizer, model, *args, **kwargs)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """See Precision; also where a plan splits some of the adapters, and others are whole.

        In Fabric call `clip_gradients` of the plugin there: `fabric.clip_gradients` clips by torch's function.
        """
        clip_grad_norm(self.main_params(optimizer), clip_val)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The states of torch's random generators, which draw dropout masks."""
        trainer = trainer_of(self._modules.last)
        after_error = trainer is not None and trainer.interrupted
        return {"random_state": torch_rng_states(gathered=not after_error)}

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
        self._random_state = state_dict["random_state"]
        set_torch_rng_state_of_rank(self._random_state)

    def _begin_epoch(self, begin: Callable[[], None], loop: Any, fetcher: Any) -> None:
        """Begin an epoch of a Trainer; `patches.restore_generators_after_loaders` calls it."""
        states = self._random_state
        self._random_state = None
        if states is None:
            begin()
        else:
            begin_epoch_of_checkpoint(states, begin, loop, fetcher)

    @override
    def teardown(self) -> None:
        """Restore the training mode of the layers; free the pages of the optimizers and the decode buffers.

        The Trainer calls it after an error too, which gets a note if it comes from what conversion changed.

        Not at the end of a run in a callback of another Trainer with this plugin, which goes on training.
        """
        error = sys.exc_info()[1]
        if error is not None:
            self._modules.advise(error)
        del self._runs[-1:]
        if any(run.state.status == TrainerStatus.RUNNING for run in self._runs):
            self._modules.use(self._runs[-1].lightning_module)
            return
        self._runs.clear()
        for layer, mode in self._mode_before.items():
            layer.training = mode
        self._mode_before.clear()
        self._random_state = None
        self.pager.close()
        scratch.release()


def _held_on_all_ranks(device: torch.device, dtype: torch.dtype) -> Held | None:
    """`held_type`, the same on all ranks, which may run on different machines; all must call it."""
    return next(filter(None, of_all_ranks(held_type(device, dtype))), None)


def _of_rank_0(origins: Origins) -> Origins:
    """What rank 0 sees; the random values of others differ, or others have not loaded what it has. All must call it."""
    return Origins(*of_all_ranks(tuple(origins))[0])


def _shards_module(trainer: Trainer | None) -> bool:
    """Whether the strategy of a Trainer shards the parameters (FSDP2 or tensor parallelism)."""
    return trainer is not None and isinstance(trainer.strategy, classes(ModelParallelStrategy))


make_changes("lightning", "torch")
