"""Run by test_ddp: under strategy="ddp" every rank loads a transformers folder in `configure_model`, in 4 bits."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lightning_qlora import QLoRAPrecision
from tests.conftest import make_trainer, run_rank, tensors
from tests.toys import Lit


class Loaded(Lit):
    def __init__(self, folder: str):
        super().__init__(None)
        self.folder = folder

    def configure_model(self):
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(self.folder)


def main(root: str) -> None:
    module = Loaded(f"{root}/base")
    run = make_trainer(
        root, plugins=QLoRAPrecision(r=4, modules_to_save=["norm"]), strategy="ddp", devices=2, max_steps=2
    )
    run.fit(module)
    held = {name: value.detach().clone() for name, value in tensors(module).items()}
    torch.save(held, Path(root) / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    run_rank(main)
