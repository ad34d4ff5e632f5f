"""A callback that writes the adapters as PEFT folders during training, for a server that reloads the newest one."""

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_qlora import save_adapter


class SaveAdapter(pl.Callback):
    """Write FOLDER/step-N with each checkpoint of the Trainer; the file FOLDER/newest names the newest.

    `keep` is how many of the last folders stay; with 2, also the one that a server may be reading.
    """

    def __init__(self, folder: str, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        name = f"step-{trainer.global_step}"
        save_adapter(pl_module, self.folder / name)  # on all ranks: it gathers sharded parameters
        if trainer.is_global_zero:
            partial = self.folder / "newest.partial"
            partial.write_text(f"{name}\n")
            partial.replace(self.folder / "newest")
            folders = sorted(self.folder.glob("step-*"), key=lambda path: path.stat().st_mtime)
            for old in folders[: -self.keep]:
                shutil.rmtree(old)
