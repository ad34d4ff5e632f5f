"""Run by test_dtensor on two ranks, and imported there for one: trains under FSDP2, with the Trainer or Fabric."""

import copy
import json
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricStrategy
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import LlamaForCausalLM

from lightning_qlora import CheckpointMismatchError, QLoRAPrecision, save_adapter
from lightning_qlora.tensors.dtensor import gather
from tests.conftest import Classifier, loader, make_trainer, run_rank
from tests.toys import Lit

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
            self.trainer.precision_plugin.convert_module(self.net)
            shard(self.net, self.device_mesh["data_parallel"])


def adapters(module):
    return {name: gather(p.detach()).clone() for name, p in module.named_parameters() if p.requires_grad}


def make_sharding_trainer(root, devices, single_file, arguments, **options):
    strategy = ModelParallelStrategy(devices, 1, save_distributed_checkpoint=not single_file)
    return make_trainer(
        root,
        plugins=QLoRAPrecision(**ARGUMENTS | arguments),
        strategy=strategy if devices > 1 else "auto",
        devices=devices,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        **options,
    )


def with_trainer(root, devices, single_file, **arguments):
    def fit(module, epochs, ckpt=None):
        logger = CSVLogger(root, name="log", version=0)
        run = make_sharding_trainer(root, devices, single_file, arguments, max_epochs=epochs, logger=logger)
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
        lambda net, mesh: shard(net, mesh["data_parallel"], policy),
        devices,
        1,
        save_distributed_checkpoint=not single_file,
    )
    fabric = Fabric(
        accelerator="cpu",
        devices=devices,
        strategy=strategy if devices > 1 else "auto",
        plugins=QLoRAPrecision(**ARGUMENTS | arguments),
    )
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


class Llama(Lit):
    """A transformers model that is loaded, and so quantized, and then sharded in configure_model."""

    def __init__(self, folder, convert_first=False):
        super().__init__(None)
        self.save_hyperparameters()

    def configure_model(self):
        if self.model is None:
            self.model = LlamaForCausalLM.from_pretrained(self.hparams.folder)
            if self._device_mesh is not None:
                if self.hparams.convert_first:
                    self.trainer.precision_plugin.convert_module(self.model)
                for part in (*self.model.model.layers, self.model):
                    fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def with_llama(root, devices, single_file, folder, **arguments):
    def fit(epochs, ckpt=None, **more):
        module = Llama(folder, convert_first="modules_to_save" in arguments)
        options = {"max_epochs": epochs, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
        run = make_sharding_trainer(root, devices, single_file, arguments | more, **options)
        run.fit(module, ckpt_path=ckpt)
        return run, module

    run, straight = fit(2, gradient_checkpointing=True)
    checkpoint = str(Path(root) / "half.ckpt")
    fit(1)[0].save_checkpoint(checkpoint)
    _, resumed = fit(2, checkpoint, gradient_checkpointing=True)  # arguments that change no function may change
    return run.global_rank, straight, resumed, {"losses": straight.losses}


def train(root, devices, loop, single_file, **arguments):
    """The rank, and what it has after training without a stop and with one; its adapter and checkpoint are in root."""
    Path(root).mkdir(parents=True, exist_ok=True)
    pl.seed_everything(1, verbose=False)
    run = {"trainer": with_trainer, "fabric": with_fabric, "llama": with_llama}[loop]
    rank, straight, resumed, more = run(root, devices, single_file, **arguments)
    save_adapter(straight, Path(root) / f"adapter{rank}")
    return rank, {"straight": adapters(straight), "resumed": adapters(resumed), **more}


def main(root, *cases):
    """Each case is JSON: the loop, if checkpoints are single files, and arguments. Its folder has the loop's name."""
    results = []
    for loop, single_file, arguments in map(json.loads, cases):
        rank, result = train(Path(root) / loop, 2, loop, single_file, **arguments)
        results.append(copy.deepcopy(result))
    torch.save(results, Path(root) / f"rank{rank}.pt")


if __name__ == "__main__":
    run_rank(main, ranks=2)
