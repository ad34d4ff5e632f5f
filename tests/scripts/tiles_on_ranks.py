"""Run by test_token_tiles.py on two ranks: DDP, FSDP2, tensor parallelism; inputs on the host, with tiles and whole."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_qlora import convert, to_parameters
from lightning_qlora.activations import host_inputs, token_tiles
from lightning_qlora.tensors.dtensor import gather
from tests.activations.test_host_inputs import LateCopies
from tests.conftest import run_rank
from tests.scripts.blocks_on_ranks import ARGUMENTS, ddp, fsdp2, tensor_parallel
from tests.toys import ids, perturb, toy


def fsdp2_of_parts(model, mesh):
    to_parameters(model)
    for layer in model.model.layers:
        fully_shard(layer.mlp, mesh=mesh)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    return model


def step(model, seed):
    tokens = ids(columns=48, seed=seed)
    for _ in range(2):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
    return {name.removeprefix("module."): gather(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def main(folder):
    dist.init_process_group("gloo")
    host_inputs.HostCopies = LateCopies
    host_inputs.is_on_card = lambda x: True
    host_inputs.LEAST = 1
    host_inputs.CHUNK = 512
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for strategy in (ddp, fsdp2, fsdp2_of_parts, tensor_parallel):
        for setting, rows in ((True, 16), ("offload", 16), ("offload", 1024)):
            token_tiles.LEAST_ROWS = rows
            model = toy("llama").train()
            report = convert(model, **ARGUMENTS, gradient_checkpointing=setting)
            perturb(model)
            seed = 0 if strategy is tensor_parallel else dist.get_rank()
            gradients = step(strategy(model, mesh), seed)
            results[strategy.__name__, setting, rows] = gradients, str(report.activations)
    torch.save(results, Path(folder) / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(main, ranks=2)
