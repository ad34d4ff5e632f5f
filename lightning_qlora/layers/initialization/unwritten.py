"""Zeros that take no memory until they are written.

The system maps fresh memory to one page of zeros and gives it memory of its own at the first write. A loaded model
then saves the half of its adapters that is B = 0, and a model that only predicts never needs it. calloc (np.zeros) does
so for large blocks only: small ones come from memory that was used before, and zeros are written to it. Therefore many
tensors are cut from one large block. Peak of loading 185 MB in 84 layers at r = 64: 0.39 of that size, with one
np.zeros a tensor 0.45, with torch.zeros 0.51.
"""

import math
import threading

import numpy as np
import torch
from torch import Tensor

BLOCK = 64 << 20  # bytes of address space: calloc of glibc maps any block above 32 MB
_lock = threading.Lock()  # transformers loads layers in several threads
_free = np.zeros(0, np.float32)  # the rest of the last block


def zeros(*shape: int) -> Tensor:
    """Zeros in fp32 on the CPU, each tensor with a storage of its own; under FakeTensorMode a fake tensor."""
    global _free
    count = math.prod(shape)
    if count == 0 or type(torch.empty(0, device="cpu")) is not Tensor:
        return torch.zeros(shape, dtype=torch.float32, device="cpu")
    with _lock:
        padded = -(-count // 16) * 16  # torch too aligns to 64 bytes
        if padded > len(_free):
            block = np.zeros(max(padded, BLOCK // 4) + 16, np.float32)
            _free = block[-block.ctypes.data % 64 // 4 :]
        data, _free = _free[:count], _free[padded:]
    return torch.from_numpy(data).view(shape)
