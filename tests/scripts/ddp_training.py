"""Run by test_ddp: trains under strategy="ddp" in as many processes as told and writes each rank's result."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_qlora import QLoRAPrecision, SaveAdapter
from tests.conftest import Classifier, loader, make_trainer, run_rank


def main(root: str, epochs: str, ckpt: str, devices: str) -> None:
    pl.seed_everything(1, verbose=False)
    module = Classifier(dropout=0.1, seed=2)
    run = make_trainer(
        root, plugins=QLoRAPrecision(r=4, lora_dropout=0.2), strategy="ddp" if devices != "1" else "auto",
        devices=int(devices), max_epochs=int(epochs), use_distributed_sampler=True,
        logger=CSVLogger(root, name="log", version=0), callbacks=SaveAdapter(Path(root) / "adapters", keep=1),
    )  # fmt: skip
    if ckpt:
        torch.manual_seed(1000 + run.global_rank)
    run.fit(module, loader(64, 4, shuffle=True), loader(16), ckpt_path=ckpt or None)
    tested = run.test(module, loader(16), verbose=False)
    torch.save(
        {
            "state": module.state_dict(),
            "losses": module.losses,
            "optimizer": run.optimizers[0].state_dict()["state"],
            "tested": tested,
            "best": run.checkpoint_callback.best_model_path,
        },
        Path(root) / f"rank{run.global_rank}.pt",
    )


if __name__ == "__main__":
    run_rank(main)
