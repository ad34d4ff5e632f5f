"""Run by test_callback.py, in two processes with the environment of torchrun."""

import io
import os

import pytest
import torch
import torch.distributed as dist

from lightning_qlora.optim import optimizer_pages
from lightning_qlora.optim.paged_state import tensors_in
from lightning_qlora.optim.pager import PagedOptimizer, Pager
from tests.conftest import run_rank
from tests.optim.runs import HAS_CXX, Regression, data, fit, parameters
from tests.optim.stand_in import StandIn

stand_in = StandIn("managed")


def ddp():
    options = {"strategy": "ddp", "devices": 2}
    plain = Regression()
    paged = Regression(placed=stand_in)
    fit(plain, **options)
    fit(paged, callbacks=PagedOptimizer(), **options)
    assert torch.equal(parameters(plain), parameters(paged))


def moment(optimizer, net):
    """The first moment of the first parameter."""
    return optimizer.state[next(net.parameters())]["exp_avg"]


def is_paged(state):
    return all(stand_in.owns(tensor) for tensor in tensors_in(state) if tensor.numel() >= 4096)


def fsdp2(make_optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2)):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))

    def sharded():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(80, 160), torch.nn.ReLU(), torch.nn.Linear(160, 64))
        for layer in net:
            if isinstance(layer, torch.nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
        return net, make_optimizer(net.parameters())

    def train(net, optimizer, batches):
        for x, y in batches:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()

    plain, reference = sharded()
    for _ in range(2):
        train(plain, reference, data())

    paged, optimizer = sharded()
    pager = Pager()
    pager.attach(optimizer)
    train(paged, optimizer, data())
    state = moment(optimizer, paged)
    assert isinstance(state, DTensor)
    assert is_paged(state)
    file = io.BytesIO()
    torch.save((paged.state_dict(), get_optimizer_state_dict(paged, optimizer)), file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    pager.close()

    again, resumed = sharded()
    again.load_state_dict(saved[0])
    second = Pager()
    second.attach(resumed)
    set_optimizer_state_dict(again, resumed, saved[1])
    train(again, resumed, data())
    assert is_paged(moment(resumed, again))
    for left, right in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(left.to_local(), right.to_local())
    second.close()
    return resumed


def fsdp2_8bit():
    """torchao's is made for FSDP2: each rank quantizes its shard."""
    AdamW8bit = pytest.importorskip("torchao.optim").AdamW8bit
    fsdp2(lambda params: AdamW8bit(params, lr=1e-2))


def main(folder):
    os.chdir(folder)
    torch.set_num_threads(1)
    optimizer_pages.open_pool = stand_in.open_pool
    dist.init_process_group("gloo")
    for mode in (ddp, fsdp2, fsdp2_8bit) if HAS_CXX else (ddp, fsdp2):
        stand_in.pools.clear()
        mode()
        assert stand_in.pools
        assert stand_in.nbytes == 0


if __name__ == "__main__":
    run_rank(main, ranks=2)
