"""A change to Fabric for paging, with the upstream file, the reason, and what would remove it."""

from typing import Any

from lightning_qlora.upstream_changes import replaces


@replaces("lightning.fabric.wrappers:_FabricOptimizer.__init__")
def call_on_setup_optimizer(original: Any, self: Any, optimizer: Any, strategy: Any, callbacks: Any = None) -> None:
    """Call `_on_setup_optimizer(optimizer)` of the plugin and callbacks of a Fabric for each optimizer that is set up.

    Upstream: lightning/fabric/wrappers.py, _FabricOptimizer.__init__.
    Supported ways tried: `on_after_setup`, which gets no optimizers; `on_after_optimizer_step` and torch's
    `register_optimizer_step_pre_hook`, which are called when all state is in device memory already.
    Removed by: a Fabric callback hook that gets the optimizers when they are set up.
    """
    original(self, optimizer, strategy, callbacks)
    for listener in (getattr(strategy, "precision", None), *(callbacks or [])):  # a mocked strategy may have none
        hook = getattr(listener, "_on_setup_optimizer", None)  # of plugin/precision.py and pager.py
        if callable(hook):
            hook(optimizer)
