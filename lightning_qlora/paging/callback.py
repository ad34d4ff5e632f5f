"""PagedOptimizer: paging for any Lightning run, QLoRA or not."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qlora import seams
from lightning_qlora.paging.pager import MIN_NUMEL, Pager, PagingReport


class PagedOptimizer(Callback):
    """Keep the optimizer state of a run in host memory and page it to the GPU for each step.

    `Trainer(callbacks=PagedOptimizer())` or `Fabric(callbacks=PagedOptimizer())`: every torch optimizer of the run is
    paged, in full fine-tuning and plain LoRA as well. With `QLoRAPrecision` it is not needed: that pages by itself.

    Args:
        min_numel: State tensors with fewer elements stay in device memory.
    """

    def __init__(self, min_numel: int = MIN_NUMEL) -> None:
        self._pager = Pager(min_numel)
        seams.announce_optimizers_to_fabric_callbacks()

    def report(self) -> PagingReport:
        """What is paged now, and how."""
        return self._pager.report()

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Before the Trainer restores optimizer state (trainer.py, `_run`)."""
        for optimizer in trainer.optimizers:
            self._pager.attach(optimizer)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Free every page."""
        self._pager.close()

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Free every page: the Trainer does not call `teardown` after an exception."""
        self._pager.close()

    def on_setup_optimizer(self, optimizer: Optimizer) -> None:
        """Fabric: called by our seam for every optimizer that is set up. Pages are freed with the optimizer."""
        self._pager.attach(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        return self._pager.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
