"""Zeros that take no memory before they are written.

A fresh anonymous mapping shows one page of zeros everywhere, until a first write makes a page of its own. Loading a
model then costs half of its adapters, B = 0 being the other half, and a model that only predicts never pays for it.
`torch.zeros` and numpy write their zeros where the C library reuses memory, which it does for most layers' sizes.
"""

import math
import mmap
import threading

import torch
from torch import Tensor

ARENA = 16 << 20  # bytes in one mapping: a system limits their number, and a mixture of experts has many layers
_lock = threading.Lock()
_arena: mmap.mmap | None = None
_used = 0


def zeros(*shape: int) -> Tensor:
    """Zeros in fp32 on the CPU, each tensor with a storage of its own; under a mode of torch's, what it makes."""
    global _arena, _used
    count = math.prod(shape)
    size = -(-count * 4 // 64) * 64  # torch's allocator aligns to 64 bytes too
    probe = torch.empty(0)
    if count == 0 or type(probe) is not Tensor or probe.device.type != "cpu":  # FakeTensorMode, torch.device("meta")
        return torch.zeros(shape, dtype=torch.float32)
    with _lock:
        if _arena is None or _used + size > len(_arena):
            _arena, _used = _mapping(max(size, ARENA)), 0
        arena, offset = _arena, _used
        _used += size
    return torch.frombuffer(arena, dtype=torch.float32, count=count, offset=offset).view(shape)


def _mapping(size: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):  # a forked process gets its own; Windows has neither fork nor the flag
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)
