"""Run by test_failing_rank, one process a rank: trains, and one rank fails at a step; writes the losses and adapters.

    failing_rank.py FOLDER STRATEGY FAILURE STEP [resume]

FAILURE: none, kill (SIGKILL in the step), stop (SIGSTOP in the step), raise, save (SIGKILL while the checkpoint of
STEP is written). A checkpoint is saved every second step.
"""

import os
import signal
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_qlora import QLoRAPrecision
from lightning_qlora.tensors.dtensor import gather
from tests.conftest import Classifier, ResumableLoader, make_trainer, run_rank

TIMEOUT = timedelta(seconds=20)
FAILING = 1  # the rank


class Failing(Classifier):
    def __init__(self, failure, step):
        super().__init__(dropout=0.1)
        self.failure = failure
        self.step = step

    def configure_model(self):
        if self._device_mesh is not None:
            self.trainer.precision_plugin.convert_module(self.net)
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        if self.global_step == self.step and self.global_rank == FAILING:
            if self.failure in ("kill", "stop"):
                os.kill(os.getpid(), signal.SIGKILL if self.failure == "kill" else signal.SIGSTOP)
            if self.failure == "raise":
                raise KeyError("a mistake on one rank")
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint):
        if self.failure == "save" and self.global_step == self.step and self.global_rank == FAILING:
            torch.save = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)


class Loader(ResumableLoader):
    """The batches of this rank."""

    def __init__(self, rank):
        super().__init__(128, 8)
        self.batches = self.batches[rank::2]


def main(folder, strategy, failure, step, resume=""):
    pl.seed_everything(1, verbose=False)
    parallel = DDPStrategy(timeout=TIMEOUT) if strategy == "ddp" else ModelParallelStrategy(2, 1, timeout=TIMEOUT)
    saving = ModelCheckpoint(Path(folder) / "saved", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    plugin = QLoRAPrecision(r=4, lora_dropout=0.1)
    trainer = make_trainer(
        folder,
        plugins=plugin,
        devices=2,
        strategy=parallel,
        callbacks=[saving],
        max_epochs=2,
        use_distributed_sampler=False,
    )
    module = Failing(failure, int(step))
    trainer.fit(module, Loader(trainer.global_rank), ckpt_path=resume or None)
    adapters = {name: gather(p.detach()) for name, p in module.named_parameters() if p.requires_grad}
    torch.save({"losses": module.losses, "adapters": adapters}, Path(folder) / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    run_rank(main)
