"""TrainerOrFabricPrecision: one Precision for both loops of Lightning, which have a class each.

The Trainer passes its LightningModule to the methods below; Fabric passes another module, or none. With the copies of
Lightning (`lightning_copies.py`) there are several classes for the Trainer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.fabric.plugins.precision.precision import Precision as FabricPrecision
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qlora.lightning_copies import classes, modules
from lightning_qlora.optim.closure import after_closure
from lightning_qlora.optim.optimizer_parameters import trainable_inputs
from lightning_qlora.plugin.converted_modules import ConvertedModules


def trainer_of(module: nn.Module | None) -> Trainer | None:
    """The Trainer a module is attached to; None in Fabric."""
    return module._trainer if isinstance(module, classes(LightningModule)) else None


def precision_class(module: nn.Module | None) -> type[Any]:
    """Fabric's class, or the Trainer's of the package that the module is from."""
    if trainer_of(module) is None:
        return FabricPrecision
    pairs = zip(classes(LightningModule), classes(Precision), strict=True)
    return next(precision for kind, precision in pairs if isinstance(module, kind))


class TrainerOrFabricPrecision(Precision):
    """Calls the method of the loop, and between a backward pass and the step checks and initializes adapters."""

    _modules: ConvertedModules

    @override
    def pre_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        return precision_class(module).pre_backward(self, tensor, module)

    @override
    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """See Precision; frozen parameters in `inputs`, which torch refuses, are left out."""
        if kwargs.get("inputs") is not None:
            kwargs["inputs"] = trainable_inputs(kwargs["inputs"])
        precision_class(model).backward(self, tensor, model, *args, **kwargs)

    @override
    def post_backward(self, tensor: Tensor, module: nn.Module | None) -> Any:
        return precision_class(module).post_backward(self, tensor, module)

    @override
    def optimizer_step(  # type: ignore[override]
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        closure: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """See Precision of lightning.pytorch (the Trainer passes the model) or lightning.fabric (it does not)."""
        if closure is not None and not _runs_backward(model, closure):
            for start, observers in self._modules.observers():
                start.before_closure(observers, optimizer)
        if model is not None:
            return Precision.optimizer_step(self, optimizer, model=model, closure=closure, **kwargs)  # type: ignore[arg-type]
        if closure is None:
            self._before_step_of_fabric(optimizer)
        else:
            kwargs["closure"] = after_closure(closure, partial(self._before_step_of_fabric, optimizer))
        return FabricPrecision.optimizer_step(self, optimizer, **kwargs)

    def _before_step_of_fabric(self, optimizer: Optimizer) -> None:
        self._modules.audit(optimizer)
        self._compute_adapters(optimizer)

    def _compute_adapters(self, optimizer: Optimizer) -> None:
        """In the first step, those that are computed from their inputs."""
        for start, observers in self._modules.observers():
            start.before_step(observers, optimizer)

    @override
    def _after_closure(self, model: LightningModule, optimizer: Any) -> None:
        """The Trainer calls this between its backward pass and its step; it clips gradients here."""
        self._modules.audit(optimizer)
        super()._after_closure(model, optimizer)
        self._compute_adapters(optimizer)

    @override
    def _clip_gradients(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """See Precision: the class of `lightning` or `pytorch_lightning` clips only for its own LightningModule."""
        precision_class(model)._clip_gradients(self, model, *args, **kwargs)


def _runs_backward(model: nn.Module | None, closure: Callable[[], Any]) -> bool:
    """Whether a closure is the Trainer's: it has the backward pass, or in manual optimization nothing."""
    if model is None:
        return False
    empty = [module.do_nothing_closure for module in modules(do_nothing_closure.__module__)]
    return bool(model.automatic_optimization) or closure in empty
