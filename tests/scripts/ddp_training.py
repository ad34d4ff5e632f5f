"""Run by test_ddp: trains under strategy="ddp" in two processes, three times, and writes each rank's results."""

import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_qlora import QLoRAPrecision, save_adapter
from tests.conftest import Classifier, loader, make_trainer, run_rank, tensors


def fit(root: Path, epochs: int, ckpt: str | None = None) -> dict[str, object]:
    pl.seed_everything(1, verbose=False)
    module = Classifier(dropout=0.1, seed=2)
    run = make_trainer(
        root,
        plugins=QLoRAPrecision(r=4, lora_dropout=0.2),
        strategy="ddp",
        devices=2,
        max_epochs=epochs,
        use_distributed_sampler=True,
        logger=CSVLogger(root, name="log", version=0),
    )
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


class Buffers(pl.Callback):
    """The buffers that DDP sends in each step."""

    def on_train_end(self, trainer, module):
        sent = {id(buffer) for buffer in trainer.strategy.model.modules_buffers}
        self.names = [name for name, buffer in module.named_buffers() if id(buffer) in sent]
        assert len(self.names) == len(sent)


def fit_with_another_start_on_each_rank(root: Path) -> dict[str, object]:
    module = Classifier(seed=int(os.environ.get("LOCAL_RANK", 0)))
    buffers = Buffers()
    module.net.append(torch.nn.BatchNorm1d(8))
    run = make_trainer(
        root,
        plugins=QLoRAPrecision(r=4, target_modules=["0", "4"]),
        strategy="ddp",
        devices=2,
        max_epochs=1,
        callbacks=buffers,
    )
    run.fit(module, loader(64, 4))
    held = {name: value.detach() for name, value in tensors(module).items() if name not in buffers.names}
    return {"tensors": held, "sent": buffers.names}  # DDP sends the buffers before a step, which changes them


def main(root: str) -> None:
    results = {"straight": fit(Path(root, "straight"), 2), "first": fit(Path(root, "first"), 1)}
    results["resumed"] = fit(Path(root, "resumed"), 2, results["first"]["best"])
    results["started"] = fit_with_another_start_on_each_rank(Path(root, "started"))
    torch.save(results, Path(root) / f"rank{results['straight']['rank']}.pt")


if __name__ == "__main__":
    run_rank(main)
