"""Run by test_loss_scale: two ranks compute in fp16, and the gradients of one overflow at first."""

from pathlib import Path

import torch

from lightning_qlora import QLoRAPrecision
from tests.conftest import Classifier, loader, make_trainer, run_rank


class Overflows(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (30.0 if self.global_rank else 1.0)


def main(root: str) -> None:
    module = Overflows()
    precision = QLoRAPrecision(r=4, compute_dtype="fp16")
    run = make_trainer(root, plugins=precision, strategy="ddp", devices=2, max_epochs=4, gradient_clip_val=1.0)
    run.fit(module, loader(64))
    scale = precision.state_dict()["loss_scale"]["scale"]
    torch.save({"state": module.state_dict(), "scale": scale}, Path(root) / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    run_rank(main)
