"""Run by tests/training/calibration/test_ddp.py: trains a calibrated module in two processes and saves its states."""

from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_qlora import QLoRAPrecision
from tests.conftest import Classifier, dataset, make_trainer, run_rank


class Experts(Classifier):
    """Every rank calls another expert in its first step."""

    def __init__(self):
        super().__init__(seed=2)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.experts = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(self.experts[(self.global_rank + batch_idx) % 2](batch[0])), batch[1])


class Called(Classifier):
    """Calls its model before the first batch."""

    def on_train_start(self):
        self.net(torch.randn(8, 64) + self.global_rank)


def tensors(module, plugin):
    sizes = plugin.report.calibration.input_rms
    return {**module.state_dict(), **{f"{name}.input_rms": size for name, size in sizes.items()}}


def main(root: str) -> None:
    results = {}
    for key, make in ((1, Classifier), (2, Classifier), ("called", Called)):
        pl.seed_everything(1, verbose=False)
        module = make(dropout=0.1, seed=2)
        plugin = QLoRAPrecision(r=4, init_lora_weights="calibrated")
        run = make_trainer(
            root,
            plugins=plugin,
            strategy="ddp",
            devices=2,
            max_steps=3,
            accumulate_grad_batches=2 if key == 2 else 1,
            enable_checkpointing=False,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        mine = Subset(dataset(64), range(run.global_rank, 64, 2))  # the samples are dealt out in turn
        run.fit(module, DataLoader(mine, batch_size=4))
        results[key] = tensors(module, plugin), plugin.report.calibration.rows
    pl.seed_everything(1, verbose=False)
    module = Experts()
    plugin = QLoRAPrecision(r=4, init_lora_weights="calibrated")
    run = make_trainer(
        root,
        plugins=plugin,
        strategy="ddp_find_unused_parameters_true",
        devices=2,
        max_steps=3,
        enable_checkpointing=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    run.fit(module, DataLoader(mine, batch_size=4))
    results["experts"] = tensors(module, plugin), plugin.report.calibration.calibrated
    torch.save(results, Path(root) / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    run_rank(main)
