"""Where Lightning would train the wrong thing in silence: an error that says what to do instead."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_qlora.linear import REPLACED


def check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """Refuse what would lose the adapters of a module that the Trainer is about to train, or not train what it should.

    Raises:
        RuntimeError: If the processes are spawned or forked from this one, or a callback holds a copy of the module
            made before conversion, or freezes and unfreezes its parameters.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        raise RuntimeError(
            f"strategy={_strategy_name(trainer)!r} trains in processes spawned or forked from this one; when they end "
            "Lightning copies only weights that the module here has, and the module here has no adapters: they would "
            "be dropped without a word. Use strategy='ddp' in a script, or torchrun."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            raise RuntimeError(
                f"{type(callback).__name__} freezes parameters before the module is converted, which decides anew what "
                "trains, and makes all parameters of a module trainable later, which 4-bit ones can't be. Remove the "
                "callback: QLoRA freezes all but the adapters, and modules_to_save names what else is to train."
            )
        copy = _copy_held_by(callback, module)
        if copy is not None:
            raise RuntimeError(
                f"{type(callback).__name__} copied the module (its attribute {copy!r}) before it was converted, and "
                "averages or restores full weights that the module no longer has. Remove the callback; to average, "
                "average the adapters of several checkpoints."
            )


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimizer that holds weights which conversion replaced, or that can't skip frozen 4-bit parameters.

    Raises:
        RuntimeError: As above.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    replaced = [getattr(p, REPLACED) for p in parameters if hasattr(p, REPLACED)]
    if replaced:
        raise RuntimeError(
            f"The {type(optimizer).__name__} was created before the module was converted: it holds the replaced "
            f"weights of {len(replaced)} layers ({replaced[0]}, ...) and none of their adapters, so nothing would "
            "train. Fabric: model = fabric.setup_module(model), then make the optimizer from model.parameters(), then "
            "fabric.setup_optimizers(optimizer). Trainer: make it inside configure_optimizers; one that was made "
            "earlier, as LightningCLI makes its own, gets the adapters only if it has no state yet."
        )
    if isinstance(optimizer, LBFGS) and not all(p.is_floating_point() for p in parameters):
        raise RuntimeError(
            "LBFGS flattens all its parameters into one tensor, and the frozen 4-bit ones can't be part of it. Give it "
            "those that train: LBFGS([p for p in self.parameters() if p.requires_grad])."
        )


def _copy_held_by(callback: Callback, module: nn.Module) -> str | None:
    for name, value in vars(callback).items():
        if isinstance(value, AveragedModel) or (type(value) is type(module) and value is not module):
            return name
    return None


def _strategy_name(trainer: Trainer) -> str:
    strategy: Any = trainer.strategy
    method = getattr(strategy, "_start_method", None)
    return f"ddp_{method}" if method else type(strategy).__name__
