"""Optimizer state that pages between host and device memory."""

from lightning_qlora.paging.callback import PagedOptimizer
from lightning_qlora.paging.optimizer import PagedAdamW, PagedAdamW8bit
from lightning_qlora.paging.pager import Pager, PagingReport

__all__ = ["PagedAdamW", "PagedAdamW8bit", "PagedOptimizer", "Pager", "PagingReport"]
