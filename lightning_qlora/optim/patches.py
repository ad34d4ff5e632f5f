"""A change to Fabric for paging, with the upstream file, the reason, and what would remove it."""

from typing import Any

from lightning_qlora.layers.patches import replaces


@replaces("lightning.fabric.wrappers:_FabricOptimizer.__init__")
def call_on_setup_optimizer(original: Any, self: Any, optimizer: Any, strategy: Any, callbacks: Any = None) -> None:
    """Call `on_setup_optimizer(optimizer)` of the plugin and callbacks of a Fabric for each optimizer that is set up.

    Upstream: lightning/fabric/wrappers.py, _FabricOptimizer.__init__. No supported hook gets the optimizers of one
    Fabric before they have state: `on_after_setup` gets none, and `setup_optimizers` does not call it;
    `on_after_optimizer_step` is called after the first step, which puts all state in device memory;
    `torch.optim.optimizer.register_optimizer_step_pre_hook` is called for the optimizers of other runs too, and only
    after `fabric.load`, which puts all loaded state in device memory.
    Removed by: a Fabric callback hook that gets the optimizers when they are set up.
    """
    original(self, optimizer, strategy, callbacks)
    for listener in (getattr(strategy, "precision", None), *(callbacks or [])):  # a mocked strategy may have none
        hook = getattr(listener, "on_setup_optimizer", None)
        if callable(hook):
            hook(optimizer)
