"""Stand-ins for the CUDA calls, on the CPU: they do what the device would do, count it, and can refuse.

`StandInMemory` hands out real memory at real addresses, so a state tensor that is not where it should be, or is used
after it was freed, shows. Its pages are resident or not, like those of unified memory.
"""

import ctypes
from dataclasses import dataclass, field

import numpy
import torch

from lightning_qlora.paging.managed import ManagedPool
from lightning_qlora.paging.pinned import PinnedPool
from lightning_qlora.paging.state import tensors_in

PAGE = 4096


@dataclass
class Span:
    address: int
    nbytes: int
    owner: object

    @property
    def __array_interface__(self):
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


@dataclass
class StandInMemory:
    budget: int = 2**40
    allocations: int = 0
    frees: int = 0
    prefetches: int = 0
    faults: int = 0
    log: list[str] = field(default_factory=list)
    blocks: dict[int, ctypes.Array] = field(default_factory=dict)
    resident: set[int] = field(default_factory=set)

    @property
    def nbytes(self):
        return sum(map(len, self.blocks.values()))

    def allocate(self, nbytes):
        if self.nbytes + nbytes > self.budget:
            raise MemoryError("refused by the stand-in")
        block = (ctypes.c_byte * nbytes)()
        self.blocks[ctypes.addressof(block)] = block
        self.allocations += 1
        return ctypes.addressof(block)

    def free(self, address):
        ctypes.memset(self.blocks[address], 0xFF, len(self.blocks[address]))  # late readers shall see NaN
        del self.blocks[address]
        self.frees += 1

    def prefetch(self, address, nbytes):
        assert any(start <= address and address + nbytes <= start + len(b) for start, b in self.blocks.items())
        self.prefetches += 1
        self.log.append("prefetch")
        self.resident |= self._pages(address, nbytes)

    def tensor(self, address, nbytes, owner):
        return torch.as_tensor(numpy.asarray(Span(address, nbytes, owner)))

    def evict(self):
        """What the driver does when forward and backward need the memory."""
        self.resident.clear()

    def touch(self, tensor):
        """What a kernel does: every page that is away is a fault."""
        pages = self._pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        self.faults += len(pages - self.resident)
        self.resident |= pages

    @staticmethod
    def _pages(address, nbytes):
        return set(range(address // PAGE, (address + nbytes - 1) // PAGE + 1))


@dataclass
class StandInTransfers:
    budget: int = 2**40
    log: list[str] = field(default_factory=list)
    held: int = 0
    on_device: int = 0
    most_on_device: int = 0
    pending: bool = False

    def host_empty(self, like, dtype):
        nbytes = like.numel() * dtype.itemsize
        if self.held + nbytes > self.budget:
            raise MemoryError("refused by the stand-in")
        self.held += nbytes
        return torch.empty_strided(like.shape, like.stride(), dtype=dtype)

    def device_empty(self, like):
        self.on_device += like.numel() * like.element_size()
        self.most_on_device = max(self.most_on_device, self.on_device)
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)

    def fetch(self, pairs):
        self.log.append(f"fetch {len(pairs)}")
        for target, source in pairs:
            target.copy_(source)

    def arrive(self):
        self.log.append("arrive")

    def store(self, pairs):
        self.log.append(f"store {len(pairs)}")
        self.pending = self.pending or bool(pairs)
        for target, source in pairs:
            target.copy_(source)
            self.on_device -= source.numel() * source.element_size()

    def synchronize(self):
        self.pending = False


class StandIn:
    """All pools that were opened, of one kind, with one budget in bytes for each."""

    def __init__(self, kind="managed", budget=2**40):
        self.kind, self.budget = kind, budget
        self.devices, self.pools = [], []

    def open_pool(self, device):
        self.devices.append(StandInMemory(self.budget) if self.kind == "managed" else StandInTransfers(self.budget))
        self.pools.append(
            ManagedPool(self.devices[-1]) if self.kind == "managed" else PinnedPool(self.devices[-1], "a stand-in")
        )
        return self.pools[-1]

    @property
    def nbytes(self):
        return sum(pool.nbytes for pool in self.pools)

    def owns(self, tensor):
        return any(pool.owns(tensor) for pool in self.pools)


def assert_all_paged(stand_in, optimizer, least=1):
    """Every state tensor of the threshold or more is in a pool, every smaller one and every `step` is not."""
    large = 0
    for state in optimizer.state.values():
        for key, value in state.items():
            for tensor in tensors_in(value):
                expected = key != "step" and tensor.numel() >= 4096
                large += expected
                assert stand_in.owns(tensor) == expected, (key, tuple(tensor.shape))
    assert large >= least
