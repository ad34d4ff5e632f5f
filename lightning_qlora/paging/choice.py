"""Which pool a device gets."""

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_qlora.paging.cuda import CudaTransfers, CudaUnifiedMemory, why_not_managed
from lightning_qlora.paging.managed import ManagedPool
from lightning_qlora.paging.pinned import PinnedPool
from lightning_qlora.paging.pool import Pool


def open_pool(device: torch.device) -> Pool | None:
    """A pool for the optimizer state of a device: unified memory where it pages, else pinned memory.

    None for a device that is no GPU: its state is in host memory already.
    """
    if device.type != "cuda":
        return None
    reason = why_not_managed(device)
    if reason is None:
        return ManagedPool(CudaUnifiedMemory(device))
    rank_zero_info(f"Optimizer state on {device} pages through pinned memory and explicit copies: {reason}.")
    return PinnedPool(CudaTransfers(device), reason)
