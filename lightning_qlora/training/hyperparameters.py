"""What a run did, as hyperparameters for the Trainer's loggers, so that runs can be compared."""

from dataclasses import asdict
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from lightning_qlora.adapters.from_checkpoint import fingerprint_of_base
from lightning_qlora.adapters.module_state import CONFIG_KEY, read_conversion
from lightning_qlora.layers.dotted_names import last_part
from lightning_qlora.training.report import ConversionReport


def log_hyperparameters(trainer: Trainer | None, module: nn.Module, report: ConversionReport) -> None:
    """Log `hyperparameters` once for a run, under "qlora". All ranks call it, since a sharded module is read."""
    if trainer is not None and trainer.loggers and getattr(trainer, "enable_autolog_hparams", True):
        values = hyperparameters(module, report)
        for logger in trainer.loggers:
            logger.log_hyperparams({"qlora": values})


def hyperparameters(module: nn.Module, report: ConversionReport) -> dict[str, Any]:
    """The arguments of the conversion, as in a checkpoint, and the numbers of the report.

    `base_fingerprint` is that of `lightning-qlora inspect`: one number for all frozen weights; "none" if checkpoints
    hold the base itself.
    """
    state = module.state_dict()
    prefix = next((key[: -len(CONFIG_KEY)] for key in state if last_part(key) == CONFIG_KEY), "")
    config, _ = read_conversion(state, prefix)
    return {
        **({} if config is None else asdict(config)),
        "layers": len(report.converted),
        "trainable_parameters": report.trainable_parameters,
        "total_parameters": report.total_parameters,
        "bytes": report.bytes_after,
        "base_fingerprint": fingerprint_of_base(state) or "none",
    }
