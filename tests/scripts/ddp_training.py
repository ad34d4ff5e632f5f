"""Run by test_ddp: trains under strategy="ddp" in two processes, three times, and writes each rank's results."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_qlora import QLoRAPrecision, save_adapter
from tests.conftest import Classifier, loader, make_trainer, run_rank


def fit(root: Path, epochs: int, ckpt: str | None = None) -> dict[str, object]:
    pl.seed_everything(1, verbose=False)
    module = Classifier(dropout=0.1, seed=2)
    run = make_trainer(
        root, plugins=QLoRAPrecision(r=4, lora_dropout=0.2), strategy="ddp", devices=2,
        max_epochs=epochs, use_distributed_sampler=True,
        logger=CSVLogger(root, name="log", version=0),
    )  # fmt: skip
    if ckpt:
        torch.manual_seed(1000 + run.global_rank)
    run.fit(module, loader(64, 4, shuffle=True), loader(16), ckpt_path=ckpt)
    save_adapter(module, root / "adapter")
    tested = run.test(module, loader(16), verbose=False)
    return {
        "rank": run.global_rank,
        "state": module.state_dict(),
        "losses": module.losses,
        "optimizer": run.optimizers[0].state_dict()["state"],
        "tested": tested,
        "best": run.checkpoint_callback.best_model_path,
    }


def main(root: str) -> None:
    results = {"straight": fit(Path(root, "straight"), 2), "first": fit(Path(root, "first"), 1)}
    results["resumed"] = fit(Path(root, "resumed"), 2, results["first"]["best"])
    torch.save(results, Path(root) / f"rank{results['straight']['rank']}.pt")


if __name__ == "__main__":
    run_rank(main)
