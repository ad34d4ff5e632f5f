"""Run by test_untrained, one process a rank: trains a module that only rank 0 loaded, and saves what each rank has."""

import os
from pathlib import Path

import torch

from lightning_qlora import QLoRAPrecision
from tests.conftest import make_trainer, run_rank, tensors
from tests.survey.test_untrained import Segmenter, batches, trained


def main(folder):
    rank = int(os.environ.get("LOCAL_RANK", 0))
    saved = {}
    for name in ("other seeds", "loaded by rank 0"):
        module = Segmenter(pretrained=name == "other seeds" or rank == 0, seed=rank)
        plugin = QLoRAPrecision(r=4)
        make_trainer(folder, devices=2, strategy="ddp", plugins=plugin).fit(module, batches())
        saved[name] = tensors(module), trained(module), plugin.report.trained_in_full
    torch.save(saved, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    run_rank(main)
