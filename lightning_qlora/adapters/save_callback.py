"""SaveAdapter: PEFT folders during training, for a server that reloads the newest one."""

import re
import shutil
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_qlora.adapters.save_load import get_adapter, save_adapter
from lightning_qlora.checks import check_choice, check_integer
from lightning_qlora.config import Base
from lightning_qlora.files.folder_writer import atomic_files
from lightning_qlora.lightning_copies import inherit_from_copies


class SaveAdapter(Callback):
    """Write the adapters as PEFT folders `FOLDER/step-N` during training; the file `FOLDER/newest` names the newest.

    It writes with each checkpoint of the Trainer, at the end of each epoch, and every n optimizer steps if n is given;
    once for a step. Lightning calls no callback for checkpoints with `save_weights_only=True`: give n for those within
    an epoch. `newest` changes in one step, when its folder is complete.

    Args:
        folder: Where to write; a folder for each run.
        every_n_train_steps: n.
        keep: How many of the last folders stay; with 2, also the one that a server may be reading.
        base: As in `save_adapter`.
        base_model: As in `save_adapter`.

    Raises:
        ValueError: At the start of training, if there is no adapter, or PEFT's format has no place for what trains.
    """

    def __init__(
        self, folder: str | Path, every_n_train_steps: int | None = None, keep: int = 2, base: Base = "quantized",
        base_model: str | Path | None = None,
    ) -> None:  # fmt: skip
        if every_n_train_steps is not None:
            check_integer("every_n_train_steps", every_n_train_steps, at_least=1)
        check_integer("keep", keep, at_least=1)
        check_choice("base", base, get_args(Base))
        self.folder, self.every_n_train_steps, self.keep = Path(folder), every_n_train_steps, keep
        self.base, self.base_model = base, base_model
        self._saved = 0  # the step of the last folder
        inherit_from_copies(SaveAdapter)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        get_adapter(pl_module)  # what cannot be saved is an error before the first step
        self._saved = trainer.global_step

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        if self.every_n_train_steps and trainer.global_step % self.every_n_train_steps == 0:
            self.on_save_checkpoint(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        step = trainer.global_step
        if step == self._saved or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it with setattr
            return
        self._saved = step
        save_adapter(pl_module, self.folder / f"step-{step}", self.base, self.base_model)  # all ranks: it gathers
        if trainer.is_global_zero:
            with atomic_files(self.folder) as partial:
                (partial / "newest").write_text(f"step-{step}\n")
            folders = [path for path in self.folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
            for old in sorted(folders, key=lambda path: path.stat().st_mtime_ns)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)

    on_train_epoch_end = on_save_checkpoint
