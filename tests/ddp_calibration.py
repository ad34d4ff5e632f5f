"""Run by test_calibration_ddp: trains a calibrated module in two processes and writes what each rank has."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Subset

from lightning_qlora import QLoRAPrecision
from tests.conftest import Classifier, dataset, make_trainer


def main(root: str) -> None:
    results = {}
    for accumulate in (1, 2):
        pl.seed_everything(1, verbose=False)
        module, plugin = Classifier(dropout=0.1, seed=2), QLoRAPrecision(r=4, init_lora_weights="calibrated")
        run = make_trainer(
            root, plugins=plugin, strategy="ddp", devices=2, max_steps=3, accumulate_grad_batches=accumulate,
            enable_checkpointing=False, limit_val_batches=0, use_distributed_sampler=False,
        )  # fmt: skip
        mine = Subset(dataset(64), range(run.global_rank, 64, 2))  # the samples are dealt out in turn
        run.fit(module, DataLoader(mine, batch_size=4))
        results[accumulate] = module.state_dict(), plugin.report.calibration.rows
    torch.save(results, Path(root) / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
