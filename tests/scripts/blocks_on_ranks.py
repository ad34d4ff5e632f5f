"""Run by test_activation_budget.py on two ranks: DDP, FSDP2, tensor parallelism and Fabric with a budget."""

from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

from lightning_qlora import QLoRAPrecision, convert, to_parameters
from lightning_qlora.activations import activation_budget
from lightning_qlora.activations.device_memory import Memory
from lightning_qlora.tensors.dtensor import gather
from tests.conftest import run_rank
from tests.scripts.tensor_parallel_training import PLAN
from tests.toys import ids, toy

ARGUMENTS = {"r": 4, "lora_dropout": 0.0, "block_size": 32}
AVAILABLE = 1_000_000


def ddp(model, _):
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model, mesh):
    to_parameters(model)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    return model


def tensor_parallel(model, mesh):
    for layer in model.model.layers:
        parallelize_module(layer, mesh, PLAN)
    return model


def steps(model, seed=0, backward=torch.Tensor.backward):
    tokens = ids(seed=seed)
    for _ in range(3):
        model.zero_grad()
        backward(model(input_ids=tokens, labels=tokens).loss)
    return {name: gather(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def main(folder):
    plugin = QLoRAPrecision(**ARGUMENTS, gradient_checkpointing="auto")
    sharding = ModelParallelStrategy(lambda model, mesh: fsdp2(model, mesh["data_parallel"]), 2, 1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=sharding, plugins=plugin)
    fabric.launch()
    # A stand-in for the device, on which rank 0 has room for all blocks and rank 1 for one
    available = AVAILABLE if fabric.global_rank == 0 else 1
    activation_budget.memory_of = lambda *_, **__: Memory(0, 0, available)
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for strategy in (ddp, fsdp2, tensor_parallel):
        for setting in (True, "auto"):
            model = toy("llama").train()
            report = convert(model, **ARGUMENTS, gradient_checkpointing=setting)
            seed = fabric.global_rank if strategy is ddp else 0
            gradients = steps(strategy(model, mesh), seed)
            results[strategy.__name__, setting] = gradients, str(report.activations)
    with fabric.init_module():
        model = toy("llama").train()
    steps(fabric.setup_module(model), backward=fabric.backward)
    results["fabric"] = plugin.report.summary()
    torch.save(results, Path(folder) / f"rank{fabric.global_rank}.pt")


if __name__ == "__main__":
    run_rank(main, ranks=2)
