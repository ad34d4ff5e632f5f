"""The memory of an emulated card, and what a kernel may do with it.

Global memory is that of the tensors of this process. Each access must lie inside a tensor that the launch can reach,
and nobody may load what another warp or block stored unless something orders the two. In shared memory races between
warps, reads of what nobody wrote and accesses past the end are found. These are the rules of the PTX ISA, "Memory
Consistency Model".
"""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BASE = 1 << 16  # nothing is mapped below
MEMORY = np.frombuffer((ctypes.c_uint8 * ((1 << 47) - BASE)).from_address(BASE), np.uint8)  # all of this process
NEVER, ON_ITS_WAY, SEVERAL = -1, -2, -2
FILL = 255  # of memory that nobody wrote: NaN as a float


class Fault(Exception):
    """The kernel did what it must not do."""


class Actors(NamedTuple):
    """Who accesses memory, an entry for each thread: its block, its warp (numbered over the grid), its barriers."""

    blocks: np.ndarray
    warps: np.ndarray
    epochs: np.ndarray  # how many barriers the block has passed


@dataclass
class Store:
    """A store of one warp to global memory.

    Attributes:
        waited: In which epoch the store had arrived, for machines that wait for stores (AMD).
        published: Whether its block released it after that.
    """

    block: int
    warp: int
    epoch: int
    waited: int | None = None
    published: bool = False


class GlobalMemory:
    """The bounds of the tensors, and the order of stores before loads, during one launch.

    Args:
        ranges: [begin, end) addresses that the kernel may touch.
    """

    def __init__(self, ranges):
        merged = []
        for begin, end in sorted(ranges):
            if merged and begin < merged[-1][1]:  # a view of another tensor
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((begin, end))
        self.begins = np.array([begin for begin, _ in merged], np.int64)
        self.ends = np.array([end for _, end in merged], np.int64)
        sizes = self.ends - self.begins
        self._starts = np.concatenate([[0], sizes.cumsum()[:-1]]).astype(np.int64)
        self._last = np.zeros(sizes.sum(), np.int32)  # the number of the last store to each byte
        self.stores = [Store(-1, -1, -1)]
        self._unpublished = {}
        self._acquired = {}  # of a block: the stores before its last acquire

    def access(self, kind, at, size, actors, waits=False):
        """Check an access of `size` bytes at each address; the places of these bytes in `MEMORY`.

        Args:
            kind: "load", "store" or "atomic".
            waits: Whether stores arrive only when their warp has waited for them.
        """
        at = at.astype(np.int64)
        tensor = np.searchsorted(self.begins, at, "right") - 1
        outside = (tensor < 0) | (at + size > self.ends[tensor])
        if outside.any():
            self._raise_outside(kind, at[outside], size)
        if kind != "atomic":
            index = (self._starts[tensor] + at - self.begins[tensor])[:, None] + np.arange(size)
            if kind == "store":
                self._store(index, actors, waits)
            else:
                self._check_order(index, actors)
        return at[:, None] - BASE + np.arange(size)

    def release(self, block, warp, epoch):
        """What the warp stored, and what its block stored before the last barrier, may be seen by other blocks."""
        kept = []
        for store in self._unpublished.get(block, ()):
            if store.waited is not None and (store.warp == warp or store.waited < epoch):
                store.published = True
            else:
                kept.append(store)
        self._unpublished[block] = kept

    def acquire(self, block):
        """The block may load what others published before."""
        self._acquired[block] = len(self.stores)

    def _store(self, index, actors, waits):
        self._check_other_blocks(index, actors)
        warps, first, number = np.unique(actors.warps, return_index=True, return_inverse=True)
        self._last[index] = (len(self.stores) + number)[:, None]
        for warp, thread in zip(warps, first, strict=True):
            store = Store(int(actors.blocks[thread]), int(warp), int(actors.epochs[thread]))
            store.waited = None if waits else store.epoch
            self.stores.append(store)
            self._unpublished.setdefault(store.block, []).append(store)

    def _check_other_blocks(self, index, actors):
        def fault(one, other):
            return Fault(f"race: blocks {one} and {other} store to the same place, and nothing orders them")

        numbers = self._last[index]
        if len(np.unique(actors.blocks)) > 1:
            places, blocks = np.unique(np.stack([index[:, 0], actors.blocks]), axis=1)
            for at in np.flatnonzero(places[1:] == places[:-1]):
                raise fault(blocks[at], blocks[at + 1])
        if not numbers.any():
            return
        threads, _ = np.nonzero(numbers)
        pairs = np.stack([numbers[numbers > 0], actors.blocks[threads]])
        for number, block in np.unique(pairs, axis=1).T:
            other = self.stores[number]
            if other.block != block and not (other.published and number < self._acquired.get(int(block), 0)):
                raise fault(other.block, block)

    def _check_order(self, index, actors):
        numbers = self._last[index]
        if not numbers.any():  # inputs, which nobody stores to
            return
        threads = np.broadcast_to(np.arange(len(index))[:, None], index.shape)[numbers > 0]
        pairs = np.stack([numbers[numbers > 0], actors.warps[threads]])
        _, first = np.unique(pairs, axis=1, return_index=True)
        for place in first:
            number, thread = int(pairs[0, place]), threads[place]
            store, block, warp = self.stores[number], int(actors.blocks[thread]), int(actors.warps[thread])
            if store.warp == warp:
                continue
            if store.block == block and store.epoch == actors.epochs[thread]:
                raise Fault(f"race: warp {warp} loads what warp {store.warp} stored, with no barrier")
            if store.block == block and store.waited not in range(int(actors.epochs[thread])):
                raise Fault(f"race: warp {warp} loads what warp {store.warp} stored and has not waited for")
            if store.block != block and not (store.published and number < self._acquired.get(block, 0)):
                why = "acquired" if store.published else "released"
                why = f"nothing orders the two: it was not {why}"
                why = "its warp has not waited for the store" if store.waited is None else why
                raise Fault(f"race: block {block} loads what block {store.block} stored, and {why}")

    def _raise_outside(self, kind, at, size):
        first = int(at[0])
        if not len(self.ends):
            raise Fault(f"{kind} of {size} bytes, and the kernel has no tensor")
        near = int(np.minimum(np.abs(self.begins - first), np.abs(self.ends - first)).argmin())
        raise Fault(
            f"{kind} of {size} bytes outside of all tensors by {len(at)} threads, {first - int(self.begins[near])} "
            f"bytes after the begin and {first - int(self.ends[near])} after the end of the nearest"
        )


class SharedMemory:
    """The shared memory of several blocks, one after the other, and who used each unit of it since the last barrier.

    Args:
        size: Bytes of a block.
        blocks: Number of blocks.
        unit: Bytes that are always accessed together; a power of two.
    """

    def __init__(self, size, blocks, unit=1):
        self.size, self.unit = -(-size // unit) * unit, unit
        self.bytes = np.full(blocks * self.size, FILL, np.uint8)
        units = blocks * self.size // unit
        self._writer, self._written = np.full(units, NEVER, np.int32), np.full(units, NEVER, np.int32)
        self._reader, self._read = np.full(units, NEVER, np.int32), np.full(units, NEVER, np.int32)
        self._time = np.zeros(units, np.int64)  # of the last write
        self._fenced = {}  # when a warp made its writes visible to asynchronous reads
        self._now = 0

    def places(self, at, size, block):
        """The indices in `bytes` of `size` bytes at each address; `block`: the number in this memory."""
        outside = (at < 0) | (at + size > self.size)
        if outside.any():
            raise Fault(f"access to byte {int(at[outside][0])} of {self.size} bytes of shared memory")
        return (block * self.size + at)[:, None] + np.arange(size)

    def load(self, places, actors):
        """The bytes [threads, size] at these places."""
        units, warps, epochs = self._units(places, actors)
        self._check_written(units)
        self._check_writers(units, warps, epochs, "reads", None)
        others = (self._read[units] == epochs) & (self._reader[units] != warps)
        self._reader[units], self._read[units] = np.where(others, SEVERAL, warps), epochs
        clash = (self._reader[units] != warps) & ~others  # two warps in this one instruction
        self._reader[units[clash]] = SEVERAL
        return self.bytes[places]

    def store(self, places, values, actors):
        """Write bytes [threads, size] there. A warp may write what is there already: Triton repeats small tiles."""
        units, warps, epochs = self._units(places, actors)
        new = (self.bytes[places] != values).reshape(-1, self.unit).any(1)
        self._check_writers(units, warps, epochs, "writes", new)
        self._check_readers(units, warps, epochs, new)
        self.bytes[places] = values
        if (self.bytes[places] != values).any():
            raise Fault("race in shared memory: threads write different values to one place at once")
        self._now += 1
        kept = ~new & (self._written[units] == epochs)  # the first of those that write it
        units, warps, epochs = units[~kept], warps[~kept], epochs[~kept]
        self._writer[units], self._written[units], self._time[units] = warps, epochs, self._now

    def begin_copy(self, places, actors):
        """An asynchronous copy to these places has begun: nobody may read there until it has ended."""
        units, warps, epochs = self._units(places, actors)
        everywhere = np.ones(len(units), bool)
        self._check_writers(units, warps, epochs, "copies to", everywhere)
        self._check_readers(units, warps, epochs, everywhere)
        self._written[units] = ON_ITS_WAY

    def fence(self, warps):
        """`fence.proxy.async`: asynchronous reads see what these warps wrote."""
        for warp in np.unique(warps):
            self._fenced[int(warp)] = self._now

    def load_asynchronously(self, places, warp, epoch, since):
        """The bytes that an asynchronous instruction of a warp group reads.

        Args:
            places: Indices in `bytes`, one for each unit: a whole tile.
            warp: The first warp of the group.
            epoch: Of its block.
            since: `now` when the instruction was issued, if it ends now; nobody may have written since.
        """
        units = np.unique(places // self.unit)
        self._check_written(units)
        if since is not None:
            if (self._time[units] > since).any():
                raise Fault("shared memory is written while an asynchronous product reads it")
        else:
            if (self._written[units] == epoch).any():  # the warps of the group are four
                raise Fault("race in shared memory: an asynchronous product reads what a warp wrote, with no barrier")
            for writer in np.unique(self._writer[units]):
                mine = units[self._writer[units] == writer]
                fenced = max(self._fenced.get(int(each), 0) for each in (writer, *range(warp, warp + 4)))
                if (self._time[mine] > fenced).any():
                    raise Fault("an asynchronous product reads what was written without fence.proxy.async")
        self._reader[units], self._read[units] = SEVERAL, epoch
        return self.bytes[places]

    @property
    def now(self):
        """A count of the writes so far."""
        return self._now

    def _units(self, places, actors):
        units = places[:, :: self.unit] // self.unit
        repeated = units.shape[1]
        return units.ravel(), np.repeat(actors.warps, repeated), np.repeat(actors.epochs, repeated)

    def _check_written(self, units):
        written = self._written[units]
        if (written == ON_ITS_WAY).any():
            raise Fault("shared memory is read before an asynchronous copy to it has ended")
        if (written == NEVER).any():
            raise Fault("shared memory is read that nobody wrote")

    def _check_writers(self, units, warps, epochs, does, new):
        others = (self._written[units] == epochs) & (self._writer[units] != warps)
        others = others if new is None else others & new
        if others.any():
            warp, writer = int(warps[others][0]), int(self._writer[units[others][0]])
            raise Fault(f"race in shared memory: warp {warp} {does} what warp {writer} wrote, with no barrier")

    def _check_readers(self, units, warps, epochs, new):
        others = (self._read[units] == epochs) & (self._reader[units] != warps) & new
        if others.any():
            warp = int(warps[others][0])
            raise Fault(f"race in shared memory: warp {warp} writes what another warp reads, with no barrier")
