"""Pager: pages the state of any torch optimizers to host memory.

    pager = Pager()
    pager.attach(optimizer)     # before training or before restoring; again does nothing
    ... optimizer.step(), optimizer.step(closure), state_dict, load_state_dict: as ever ...
    print(pager.report())
    pager.close()               # state to plain host memory, every page freed

`attach` is all there is to hook up: the closure Lightning hands to `optimizer.step` is taken care of (see pages.py).
On a CPU it does nothing but watch.
"""

import weakref
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from lightning_qlora.paging.pages import OptimizerPages, pages_of

MIN_NUMEL = 4096  # as PagedAdamW8bit: smaller state is too small to be worth a page


@dataclass(frozen=True)
class PagingReport:
    """What a pager pages.

    Attributes:
        kind: "managed" (CUDA unified memory), "pinned" (pinned memory and copies), "plain" (no GPU, nothing to page).
        reason: Why it isn't "managed"; empty if it is.
        tensors: State tensors paged.
        nbytes: Their bytes.
    """

    kind: str
    reason: str
    tensors: int
    nbytes: int

    def __str__(self) -> str:
        if self.kind == "plain":
            return "Optimizer state is not paged: it is in host memory already, or has not been made yet."
        how = "CUDA unified memory" if self.kind == "managed" else f"pinned memory and copies, because {self.reason}"
        return f"Optimizer state paged: {self.tensors} tensors, {self.nbytes / 2**20:,.1f} MiB, through {how}."


class Pager:
    """Pages the state of the optimizers attached to it.

    Args:
        min_numel: State tensors with fewer elements stay in device memory.
    """

    def __init__(self, min_numel: int = MIN_NUMEL) -> None:
        self._min_numel = min_numel
        self._pages: weakref.WeakKeyDictionary[Optimizer, OptimizerPages] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {"min_numel": self._min_numel}  # pages belong to optimizers, a copy has none

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def attach(self, optimizer: Optimizer) -> None:
        """Page the state of a torch optimizer from now on; what it has already is paged at once.

        An optimizer that is paged already, by this pager or another or by itself (PagedAdamW), keeps its pages; this
        pager's `close` frees them too.

        Raises:
            TypeError: If it is no `torch.optim.Optimizer`.
            MemoryError: If memory for the state it already has is refused.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"Paging works on torch.optim.Optimizer, not on {type(optimizer).__name__}. "
                "Pass paged_optimizer=False to train without it."
            )
        if optimizer not in self._pages:
            self._pages[optimizer] = pages_of(optimizer) or OptimizerPages(optimizer, self._min_numel)

    def report(self) -> PagingReport:
        """What is paged now, and how."""
        paged = [item for pages in self._pages.values() for item in pages.paged()]
        if not paged:
            return PagingReport("plain", "no state on a GPU", 0, 0)
        tensors = [tensor for _, tensors in paged for tensor in tensors]
        pool = paged[0][0]
        return PagingReport(pool.kind, pool.reason, len(tensors), sum(t.numel() * t.element_size() for t in tensors))

    def close(self) -> None:
        """Stop paging: all state moves to plain host memory, as Lightning's own teardown does, and every page is freed.

        The optimizers stay readable and can be saved; to step again, move their state to the device first.
        """
        for pages in list(self._pages.values()):
            pages.close()
        self._pages.clear()
