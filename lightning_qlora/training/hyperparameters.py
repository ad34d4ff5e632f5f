"""What a run did, as hyperparameters for the Trainer's loggers, so that runs can be compared."""

from dataclasses import asdict

from lightning.pytorch import Trainer
from torch import nn

from lightning_qlora.adapters.from_checkpoint import fingerprint_of_base
from lightning_qlora.adapters.module_state import conversion_of
from lightning_qlora.training.report import ConversionReport


def log_hyperparameters(trainer: Trainer | None, module: nn.Module, report: ConversionReport) -> None:
    """Log the arguments of the conversion and the numbers of the report under "qlora", once for a run.

    All ranks call it, since a sharded module is read. `base_fingerprint` is that of `lightning-qlora inspect`: one
    number for all frozen weights; "none" if checkpoints hold the base itself.
    """
    conversion = conversion_of(module)
    if trainer is None or conversion is None or not trainer.loggers:
        return
    if not getattr(trainer, "enable_autolog_hparams", True):
        return
    values = {
        **asdict(conversion.config),
        "adapter": None,  # a folder that was read once
        "layers": len(report.converted),
        "trainable_parameters": report.trainable_parameters,
        "total_parameters": report.total_parameters,
        "bytes": report.bytes_after,
        "base_fingerprint": fingerprint_of_base(module.state_dict()) or "none",
    }
    for logger in trainer.loggers:
        logger.log_hyperparams({"qlora": values})
