"""Every place where Lightning, torch or transformers offers no hook and we wrap one of theirs.

One function each: what is wrapped (upstream file and line), why, and what upstream change would remove it.
"""

from functools import wraps
from typing import Any

from lightning.fabric.wrappers import _FabricOptimizer


def announce_fabric_optimizers() -> None:
    """Tell Fabric callbacks about each optimizer that is set up, through their `on_setup_optimizer(optimizer)`.

    Wraps `_FabricOptimizer.__init__` (lightning/fabric/wrappers.py:51, Lightning 2.6.6); inert without such a hook.
    Why: Fabric calls `on_after_setup` without the optimizers, never calls it from `setup_optimizers`, and calls
    `on_after_optimizer_step` when the first step has already put all optimizer state in device memory.
    Removed by: an `on_after_setup_optimizers(fabric, optimizers)` callback hook in Fabric.
    """
    original = _FabricOptimizer.__init__
    if getattr(original, "_announces", False):
        return

    @wraps(original)
    def announcing(self: Any, optimizer: Any, strategy: Any, callbacks: Any = None) -> None:
        original(self, optimizer, strategy, callbacks)
        for callback in callbacks or []:
            hook = getattr(callback, "on_setup_optimizer", None)
            if callable(hook):
                hook(optimizer)

    announcing._announces = True  # type: ignore[attr-defined]
    _FabricOptimizer.__init__ = announcing  # type: ignore[method-assign]
