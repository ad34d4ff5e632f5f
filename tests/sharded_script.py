"""Run by test_sharded: trains under FSDP2, or on one device, with the Trainer or Fabric; writes each rank's results."""

import copy
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricStrategy
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lightning_qlora import CheckpointMismatchError, QLoRAPrecision, save_adapter
from lightning_qlora.sharded import whole
from tests.conftest import Classifier, loader, make_trainer

ARGUMENTS = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
POLICIES = {"fp32": MixedPrecisionPolicy(), "bf16": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}


def shard(net, mesh, policy="fp32"):
    if not isinstance(net, FSDPModule):
        fully_shard(net[0], mesh=mesh, mp_policy=POLICIES[policy])
        fully_shard(net, mesh=mesh, mp_policy=POLICIES[policy])
    return net


class Sharded(Classifier):
    """As users write it for FSDP2."""

    def configure_model(self):
        if self._device_mesh is not None:
            shard(self.net, self.device_mesh["data_parallel"])


def adapters(module):
    return {name: whole(p.detach()).clone() for name, p in module.named_parameters() if p.requires_grad}


def with_trainer(root, devices, single_file, **arguments):
    def fit(module, epochs, ckpt=None):
        strategy = ModelParallelStrategy(devices, 1, save_distributed_checkpoint=not single_file)
        run = make_trainer(
            root, plugins=QLoRAPrecision(**ARGUMENTS | arguments), strategy=strategy if devices > 1 else "auto",
            devices=devices, max_epochs=epochs, use_distributed_sampler=False, enable_checkpointing=False,
        )  # fmt: skip
        run.fit(module, loader(), ckpt_path=ckpt)
        return run

    straight = Sharded()
    run = fit(straight, 2)
    half = Sharded()
    fit(half, 1).save_checkpoint(Path(root) / "half.ckpt")
    resumed = Sharded()
    fit(resumed, 2, ckpt=str(Path(root) / "half.ckpt"))
    refused = ""
    if devices > 1:
        try:
            fit(Sharded(seed=3), 2, ckpt=str(Path(root) / "half.ckpt"))
        except CheckpointMismatchError as error:
            refused = str(error)
    return run.global_rank, straight, resumed, {"refused": refused, "report": str(run.precision_plugin.report)}


def with_fabric(root, devices, single_file, policy="fp32", **arguments):
    strategy = FabricStrategy(
        lambda net, mesh: shard(net, mesh["data_parallel"], policy), devices, 1,
        save_distributed_checkpoint=not single_file,
    )  # fmt: skip
    fabric = Fabric(
        accelerator="cpu", devices=devices, strategy=strategy if devices > 1 else "auto",
        plugins=QLoRAPrecision(**ARGUMENTS | arguments),
    )  # fmt: skip
    fabric.launch()

    def setup():
        net = fabric.setup_module(Classifier().net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        return {"net": net, "optimizer": fabric.setup_optimizers(optimizer)}

    def train(state, batches):
        for x, y in batches:
            part = slice(fabric.global_rank * 8 // devices, (fabric.global_rank + 1) * 8 // devices)
            loss = torch.nn.functional.cross_entropy(state["net"](x[part]), y[part])
            fabric.backward(loss)
            state["optimizer"].step()
            state["optimizer"].zero_grad()
        return state["net"]

    batches = list(loader(64, 8))
    state = setup()
    train(state, batches[:4])
    fabric.save(Path(root) / "half.ckpt", state)
    straight = train(state, batches[4:])
    again = setup()
    fabric.load(Path(root) / "half.ckpt", again)
    return fabric.global_rank, straight, train(again, batches[4:]), {}


def main(root, loop, devices, single_file, *pairs):
    pl.seed_everything(1, verbose=False)
    arguments = dict(pair.split("=") for pair in pairs)
    run = {"trainer": with_trainer, "fabric": with_fabric}[loop]
    rank, straight, resumed, more = run(root, int(devices), single_file == "True", **arguments)
    save_adapter(straight, Path(root) / f"adapter{rank}")
    results = {"straight": adapters(straight), "resumed": adapters(resumed), **more}
    torch.save(copy.deepcopy(results), Path(root) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
