"""PagedOptimizer: paging for any Lightning run, QLoRA or not."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qlora.layers.patches import make_changes
from lightning_qlora.lightning_copies import inherit_from_copies
from lightning_qlora.optim import patches as _patches  # noqa: F401, `make_changes` makes its change
from lightning_qlora.optim.paging.pager import MIN_NUMEL, Pager, PagingReport


class PagedOptimizer(Callback):
    """Keep the optimizer state of a run in host memory and page it to the GPU for each step.

    `Trainer(callbacks=PagedOptimizer())` or `Fabric(callbacks=PagedOptimizer())` pages every torch optimizer of the
    run, for example in full fine-tuning or with plain LoRA. With `QLoRAPrecision` it is not needed: the plugin does it.

    Args:
        min_numel: State tensors with fewer elements stay in device memory.
    """

    def __init__(self, min_numel: int = MIN_NUMEL) -> None:
        self._pager = Pager(min_numel)
        make_changes("lightning")
        inherit_from_copies(PagedOptimizer)

    def report(self) -> PagingReport:
        """What is paged now, and how."""
        return self._pager.report()

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Page the optimizers, before the Trainer restores their state (trainer.py, `_run`)."""
        for optimizer in trainer.optimizers:
            self._pager.attach(optimizer)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Free all pages."""
        self._pager.close()

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Free all pages: the Trainer does not call `teardown` after an exception."""
        self._pager.close()

    def on_setup_optimizer(self, optimizer: Optimizer) -> None:
        """Page an optimizer of Fabric; see `patches.call_on_setup_optimizer`. Its pages are freed with it."""
        self._pager.attach(optimizer)

    def __reduce__(self) -> Any:
        return type(self), (self._pager.min_numel,)
