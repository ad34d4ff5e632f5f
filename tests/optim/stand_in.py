"""Pools on the CPU that do what the device would do, count it, and can refuse memory.

They allocate real memory at real addresses and overwrite it when it is freed, so the tests see a state tensor that is
in the wrong place, or that is used after it was freed. Pages of unified memory are on the device or not. Copies of
pinned memory arrive only when something waits for them: until then the target holds NaN or 255.
"""

import ctypes
from collections import Counter

import torch

from lightning_qlora.optim.host_memory import ManagedPool, PinnedPool
from lightning_qlora.optim.paged_state import tensors_in
from lightning_qlora.optim.pool import Pool

PAGE = 4096
CPU = torch.device("cpu")


class CountingAllocator:
    """`_allocate` and `_free` with a budget."""

    def __init__(self, budget=2**40):
        self.budget = budget
        self.counts = Counter()
        self.log = []
        self.blocks = {}

    def _allocate(self, nbytes):
        if self.allocated + nbytes > self.budget:
            raise MemoryError("refused by the stand-in")
        block = (ctypes.c_byte * nbytes)()
        self.blocks[ctypes.addressof(block)] = block
        self.counts["allocations"] += 1
        return ctypes.addressof(block)

    def _free(self, address):
        ctypes.memset(self.blocks[address], 0xFF, len(self.blocks[address]))  # so that late readers see NaN
        del self.blocks[address]
        self.counts["frees"] += 1

    @property
    def allocated(self):
        return sum(map(len, self.blocks.values()))


class StandInManagedPool(CountingAllocator, ManagedPool):
    def __init__(self, budget=2**40):
        Pool.__init__(self, CPU)
        CountingAllocator.__init__(self, budget)
        self.resident = set()

    def _prefetch_range(self, address, nbytes):
        assert any(start <= address and address + nbytes <= start + len(b) for start, b in self.blocks.items())
        self.counts["prefetches"] += 1
        self.log.append("prefetch")
        self.resident |= self._pages(address, nbytes)

    def driver_evicts(self):
        """What the driver does when forward and backward need the memory."""
        self.resident.clear()

    def touch(self, tensor):
        """What a kernel does: every page that is on the host is a fault."""
        pages = self._pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        self.counts["faults"] += len(pages - self.resident)
        self.resident |= pages

    @staticmethod
    def _pages(address, nbytes):
        return set(range(address // PAGE, (address + nbytes - 1) // PAGE + 1))


class StandInPinnedPool(CountingAllocator, PinnedPool):
    def __init__(self, budget=2**40):
        Pool.__init__(self, CPU, "a stand-in")
        CountingAllocator.__init__(self, budget)
        self._device = CPU
        self._pinned = torch.utils.weak.WeakIdKeyDictionary()
        self.on_device = self.most_on_device = 0
        self.to_device = []  # (target, values) of copies that no kernel has waited for
        self.to_host = {}  # address -> values of copies that the CPU has not waited for

    def _copy_to_device(self, pairs):
        self.log.append(f"fetch {len(pairs)}")
        for target, source in pairs:
            values = self.to_host.get(source.data_ptr(), source)  # copies are in order on their stream
            self.to_device.append((target, values.clone()))
            target.untyped_storage().fill_(0xFF)
            self.on_device += target.numel() * target.element_size()
        self.most_on_device = max(self.most_on_device, self.on_device)

    def wait_prefetch(self):
        self.log.append("wait")
        for target, values in self.to_device:
            target.copy_(values)
        self.to_device.clear()

    def _copy_to_host(self, pairs):
        self.log.append(f"store {len(pairs)}")
        for target, source in pairs:
            assert all(source.data_ptr() != fetched.data_ptr() for fetched, _ in self.to_device), "no kernel has waited"
            self.to_host[target.data_ptr()] = source.clone()
            target.untyped_storage().fill_(0xFF)
            self.on_device -= source.numel() * source.element_size()

    def synchronize(self):
        for address, values in self.to_host.items():
            ctypes.memmove(address, values.data_ptr(), values.numel() * values.element_size())
        self.counts["synchronizations"] += bool(self.to_host)
        self.to_host.clear()

    def _free(self, address):
        size = len(self.blocks[address])
        self.to_host = {start: v for start, v in self.to_host.items() if not address <= start < address + size}
        super()._free(address)


class StandIn:
    """All pools of one kind that were opened, each with one budget in bytes."""

    def __init__(self, kind="managed", budget=2**40):
        self.kind = kind
        self.budget = budget
        self.pools = []

    def install(self, monkeypatch):
        """Let all optimizers use these pools."""
        monkeypatch.setattr("lightning_qlora.optim.optimizer_pages.open_pool", self.open_pool)
        return self

    def open_pool(self, device):
        self.pools.append((StandInManagedPool if self.kind == "managed" else StandInPinnedPool)(self.budget))
        return self.pools[-1]

    @property
    def nbytes(self):
        return sum(pool.nbytes for pool in self.pools)

    def owns(self, tensor):
        return any(pool.owns(tensor) for pool in self.pools)


def assert_all_paged(stand_in, optimizer, least=1):
    """Every state tensor of 4096 elements or more is in a pool, every smaller one and every `step` is not."""
    large = 0
    for state in optimizer.state.values():
        if not isinstance(state, dict):
            continue
        for key, value in state.items():
            for tensor in tensors_in(value):
                expected = key != "step" and tensor.numel() >= 4096
                large += expected
                assert stand_in.owns(tensor) == expected, (key, tuple(tensor.shape))
    assert large >= least
