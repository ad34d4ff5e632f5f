"""FSDP2 on two ranks: calls that were prepared, and calls that ask everything, train alike bit for bit."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_qlora import convert, to_parameters
from lightning_qlora.layers.prepared_call import PreparedCall
from tests.conftest import run_rank
from tests.toys import perturb


def train(prepares: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    convert(net, r=4, lora_dropout=0.2)
    perturb(net, 0.1)
    to_parameters(net)
    for layer in net:
        fully_shard(layer)
    fully_shard(net)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(10 + dist.get_rank())
    values = []
    for _ in range(4):
        for rows in (2, 0, 70):
            if not prepares:
                for layer in net:
                    vars(layer).pop("_prepared", None)
            loss = net(torch.randn(rows, 64)).square().sum() / 100
            loss.backward()
            values.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return [*values, *(p.full_tensor().detach() for p in net.parameters() if p.requires_grad)]


def counted(kept: list[bool]):
    """`PreparedCall.facts_of` that adds to the list, for each call that finds one of before, whether that is used."""
    facts_of = PreparedCall.facts_of

    def count(call, *given):
        facts = facts_of(call, *given)
        if call.facts is not None:
            kept.append(call.facts == facts)
        return facts

    return count


def main() -> None:
    dist.init_process_group("gloo")
    calls: list[bool] = []
    PreparedCall.facts_of = counted(calls)  # type: ignore[method-assign]
    ours = train(True)
    assert len(calls) > 30 and all(calls)
    for one, other in zip(ours, train(False), strict=True):
        assert torch.equal(one, other)
    dist.destroy_process_group()


if __name__ == "__main__":
    import os

    os.environ.setdefault("MASTER_PORT", "29571")
    run_rank(main, 2)
