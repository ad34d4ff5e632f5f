"""Pager: pages the state of torch optimizers to host memory; PagedOptimizer, its callback for any Lightning run."""

import weakref
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qlora.lightning_copies import inherit_from_copies
from lightning_qlora.optim import patches as _patches  # noqa: F401, `make_changes` makes its change
from lightning_qlora.optim.optimizer_pages import OptimizerPages, page_optimizer
from lightning_qlora.optim.pool import MIB
from lightning_qlora.upstream_changes import make_changes

MIN_NUMEL = 4096  # below it the bookkeeping costs more than the memory; bitsandbytes' limit for 8-bit state


@dataclass(frozen=True)
class PagingReport:
    """What a pager pages."""

    kind: str  # "managed" (CUDA unified memory), "pinned" (pinned memory and copies), "plain" (nothing to page)
    reason: str  # why it is not "managed"; empty if it is
    tensors: int  # number of paged state tensors
    nbytes: int  # their bytes
    allocated: int  # bytes of host memory that are allocated for them

    def __str__(self) -> str:
        if self.kind == "plain":
            return "Optimizer state is not paged: it is in host memory already, or does not exist yet."
        memory = "CUDA unified memory"
        if self.kind != "managed":
            memory = f"pinned memory and copies, because {self.reason}"
        sizes = f"{self.nbytes / MIB:,.1f} MiB ({self.allocated / MIB:,.1f} MiB allocated)"
        return f"Optimizer state paged: {self.tensors} tensors, {sizes}, through {memory}."


class Pager:
    """Pages the state of the optimizers attached to it: tensors of `min_numel` elements and more.

    An optimizer is attached before it trains or loads a checkpoint. On a CPU nothing moves.
    """

    def __init__(self, min_numel: int = MIN_NUMEL) -> None:
        self.min_numel = min_numel
        self._pages: weakref.WeakKeyDictionary[Optimizer, OptimizerPages] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return Pager, (self.min_numel,)  # optimizers and their pages are not copied

    def attach(self, optimizer: Optimizer) -> None:
        """Page the state of a torch optimizer from now on, also the state that exists already.

        One that is paged already, by another pager or by itself (PagedAdamW), keeps its pages; `close` also frees them.
        Raises TypeError if it is no `torch.optim.Optimizer`, and MemoryError if memory is refused.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Paging works with torch.optim.Optimizer, not with {type(optimizer).__name__}. "
                "Pass paged_optimizer=False to train without it."
            )
        self._pages[optimizer] = page_optimizer(optimizer, self.min_numel)

    def report(self) -> PagingReport:
        paged = [each for pages in self._pages.values() for each in pages.paged()]
        if not paged:
            return PagingReport("plain", "no state on a GPU", 0, 0, 0)
        first = paged[0][0]
        sizes = [tensor.nbytes for _, tensors in paged for tensor in tensors]
        return PagingReport(first.kind, first.reason, len(sizes), sum(sizes), sum(pool.nbytes for pool, _ in paged))

    def close(self) -> None:
        """Stop paging: all state moves to plain host memory, as in Lightning's own teardown; all pages are freed.

        The optimizers can still be read and saved. Before another step, move their state to the device.
        """
        for pages in list(self._pages.values()):
            pages.close()
        self._pages.clear()


@inherit_from_copies
class PagedOptimizer(Callback):
    """Keep the optimizer state of a run in host memory and page it to the GPU for each step.

    `Trainer(callbacks=PagedOptimizer())` or `Fabric(callbacks=PagedOptimizer())` pages every torch optimizer of the
    run, for example in full fine-tuning or with plain LoRA. With `QLoRAPrecision` it is not needed: the plugin does it.

    Args:
        min_numel: State tensors with fewer elements stay in device memory.

    Example:
        ```python
        from lightning.pytorch import Trainer
        from lightning_qlora import PagedOptimizer
        from my_module import MyModule, data

        paged = PagedOptimizer()
        Trainer(max_epochs=1, callbacks=paged).fit(MyModule(), data)
        print(paged.report())
        ```
    """

    def __init__(self, min_numel: int = 4096) -> None:
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

    def _on_setup_optimizer(self, optimizer: Optimizer) -> None:
        # `patches.call_on_setup_optimizer` calls it. The pages are freed with the optimizer.
        self._pager.attach(optimizer)

    def __reduce__(self) -> Any:
        return type(self), (self._pager.min_numel,)
