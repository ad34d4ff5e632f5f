"""Sums that several programs compute together, added in a fixed order: always the same bits, and no second launch.

Each program writes its share of a tile to its own place and then counts itself. The program that counts last adds all
shares in their order, so the order does not depend on which program that is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_qlora.kernels.scratch import scratch

COUNTERS = tl.constexpr(1024)  # tiles that may be split


@triton.jit
def add_shares(total, memory, share, shares, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum over all shares of a tile [ROWS, COLUMNS], and a mask that is true in the program that has the sum."""
    tile, tiles = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.num_programs(0) * tl.num_programs(1)
    counter, sums = memory.to(tl.pointer_type(tl.int32)) + tile, memory + COUNTERS
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(sums + (share * tiles + tile).to(tl.int64) * (ROWS * COLUMNS) + place, total)
    tl.debug_barrier()  # all threads have written before one of them counts
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    if before == shares - 1:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for other in range(shares):
            # .cg: from the L2 cache, where the other programs' values are
            at = sums + (other * tiles + tile).to(tl.int64) * (ROWS * COLUMNS) + place
            total += tl.load(at, cache_modifier=".cg")
        tl.store(counter, 0)  # for the next launch on this stream
    return total, place * 0 + before == shares - 1


def number_of_shares(tiles: int, programs: int, steps: int) -> int:
    """Enough shares that all programs are busy, with at least four of the `steps` of the loop for each.

    One on AMD: on CDNA (MI200, MI300) Triton 3.6 to 3.9 compiles the barrier to `s_barrier` alone, and the wave that
    counts waits for its own stores only, so the last program could read a share before another wave's part of it is
    there. LLVM says that its fences do not cover the stores of other waves (llvm-project pull request 161638).
    """
    return 1 if torch.version.hip or tiles > COUNTERS.value else max(1, min(programs // tiles, steps // 4))


def number_of_sums(shares: int, numel: int) -> int:
    """The fp32 numbers that the shares of a result of `numel` elements need: none for one share."""
    return 0 if shares == 1 else COUNTERS.value + shares * numel


def share_memory(sums: int, out: Tensor) -> Tensor:
    """The counters, which are zero before and after a launch, and the sums; `out` if there are none."""
    return scratch(sums, torch.float32, out.device, "shares", zero=True) if sums else out
