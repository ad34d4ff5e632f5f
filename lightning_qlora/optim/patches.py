"""Changes to Lightning's code for paging, each with the upstream file, the reason, and what would remove it."""

import sys
from collections.abc import Callable
from typing import Any

from lightning_qlora.layers.patches import wrap_once


def call_on_setup_optimizer() -> None:
    """Call `on_setup_optimizer(optimizer)` of the plugin and callbacks of a Fabric for each optimizer that is set up.

    Upstream: lightning/fabric/wrappers.py, _FabricOptimizer.__init__. No supported hook gets the optimizers of one
    Fabric before they have state: `on_after_setup` gets none, and `setup_optimizers` does not call it;
    `on_after_optimizer_step` is called after the first step, which puts all state in device memory;
    `torch.optim.optimizer.register_optimizer_step_pre_hook` is called for the optimizers of other runs too, and only
    after `fabric.load`, which puts all loaded state in device memory.
    Removed by: a Fabric callback hook that gets the optimizers when they are set up.
    """
    from lightning.fabric.wrappers import _FabricOptimizer

    def init(original: Any, self: Any, optimizer: Any, strategy: Any, callbacks: Any = None) -> None:
        original(self, optimizer, strategy, callbacks)
        for listener in (strategy.precision, *(callbacks or [])):
            hook = getattr(listener, "on_setup_optimizer", None)
            if callable(hook):
                hook(optimizer)

    wrap_once(_FabricOptimizer, "__init__", init)


def name_the_package_to_import_from() -> None:
    """Let the Trainer and Fabric of pytorch_lightning and lightning_fabric refuse our plugin and callback by name.

    Upstream: pytorch_lightning/trainer/trainer.py, Trainer.__init__, and lightning_fabric/fabric.py, Fabric.__init__.
    These packages have copies of the classes of lightning.pytorch and lightning.fabric, and an object of one package
    is no instance of the other's classes: "Found invalid type for plugin", "'PagedOptimizer' object is not iterable",
    or no error and no paging.
    Supported ways tried: none; upstream only checks the classes.
    Removed by: the end of the two packages, or an error of theirs that names the other package.
    """
    for theirs, file, owner, ours in (
        ("pytorch_lightning", "trainer.trainer", "Trainer", "lightning.pytorch"),
        ("lightning_fabric", "fabric", "Fabric", "lightning.fabric"),
    ):
        module = sys.modules.get(f"{theirs}.{file}")
        if module is not None:
            wrap_once(getattr(module, owner), "__init__", _refuse_our_objects(theirs, ours))


def _refuse_our_objects(theirs: str, ours: str) -> Callable[..., Any]:
    def refuse(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        for given in (*args, *kwargs.values()):
            for value in given if isinstance(given, list) else [given]:
                if any(kind.__module__.startswith("lightning_qlora.") for kind in type(value).__mro__):
                    raise TypeError(
                        f"{type(value).__name__} belongs to the package `lightning`, and this is the separate package "
                        f"`{theirs}`. Import from {ours} (pip install lightning) instead of from {theirs}: the "
                        "classes have the same names and arguments there."
                    )
        return original(self, *args, **kwargs)

    return refuse
