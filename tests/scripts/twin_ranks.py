"""Run by test_twin.py as two or three ranks: actions on a module and its dense twin.

    twin_ranks.py MODE KIND RANKS RANK FILE

MODE "apart": each rank does the actions in an order of its own, so anything collective ends in a timeout. "raise": rank
1 raises in the middle, and the others go on. "ddp": all do the same actions on batches of their own, and DDP
averages the gradients of both the module and its twin. FILE is where the ranks meet.
"""

import random
from datetime import timedelta

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import run_rank
from tests.test_twin import ACTIONS, KINDS, Interrupted, Pair

RUNS = {"fit", "resume_fit"}  # all ranks begin a run together, and compare their bases
# In them gradients are not those of a backward pass of the whole module, or a cast, which DDP's buckets do not follow.
ALONE = {"functional", "recompute", "interrupted_backward", "interrupted_forward", "lightning_checkpoint"}
ALONE |= {"cast_and_back"}


class PairOfRanks(Pair):
    """A pair whose gradients DDP averages over ranks with other batches."""

    wrapped = ()

    def batch(self):
        self.batches += 1
        return self.kind.batch(dist.get_world_size() * self.batches + dist.get_rank())

    def loss(self, module, batch, call=None):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        wrapper = next(
            (each for each, of, those in self.wrapped if of is module and those == [*map(id, trained)]), None
        )
        if wrapper is None:
            self.wrapped = [each for each in self.wrapped if each[1] is not module]
            wrapper = DistributedDataParallel(module)
            self.wrapped.append((wrapper, module, [*map(id, trained)]))
        return super().loss(module, batch, wrapper)


def main(mode, kind, ranks, rank, file):
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=int(rank), world_size=int(ranks), timeout=timedelta(seconds=120)
    )
    titles = [title for title in ACTIONS if title not in RUNS and (mode != "ddp" or title not in ALONE)]
    random.Random(0 if mode == "ddp" else int(rank)).shuffle(titles)
    pair = (PairOfRanks if mode == "ddp" else Pair)(KINDS[kind])
    for number, title in enumerate(titles):
        ACTIONS[title](pair, number)
        pair.check()
        if mode == "raise" and rank == "1" and number == len(titles) // 2:
            raise Interrupted
        print(f"{title}({number})", flush=True)
    if mode != "raise":
        dist.barrier()
    print("all equal", flush=True)


if __name__ == "__main__":
    run_rank(main)
