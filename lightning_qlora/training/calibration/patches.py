"""Changes to objects of Lightning while adapters are calibrated, each with the upstream file, and what would remove it.

They are made only for the extra run of a calibration, and taken back.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from lightning_qlora.lightning_copies import classes
from lightning_qlora.training.rng_state import is_rng_state_of_process, set_rng_states


class ReadAhead(NamedTuple):
    """What a data fetcher gave, and the random generators before and after."""

    item: Any
    rng_before: dict[str, Any]
    rng_after: dict[str, Any]


def return_to_trainer(fetcher: Any, taken: list[ReadAhead], states: list[Any], rest: Iterator[Any]) -> None:
    """Let the Trainer's fetcher of training data give what was read ahead from it again, and then the rest.

    `states` are those of the loader before it was read ahead and after each item that was `taken`.

    Upstream: lightning/pytorch/loops/fetchers.py, _DataFetcher.__next__ reads from its `iterator`;
    lightning/pytorch/utilities/combined_loader.py, CombinedLoader._state_dicts is what a checkpoint saves.
    Supported ways tried: none; `trainer.train_dataloader` is read once, before the first batch.
    Removed by: a fetcher with a method to peek.
    """
    loader = fetcher.combined_loader

    def again() -> Iterator[Any]:
        for place, (item, rng_before, rng_after) in enumerate(taken, start=1):
            if place < len(taken):
                loader._state_dicts = lambda place=place: states[place]
            else:
                del loader._state_dicts  # from here on the loader's own
            if is_rng_state_of_process(rng_before):
                set_rng_states(rng_after)
            yield item

    loader._state_dicts = lambda: states[0]
    fetcher.iterator = itertools.chain(again(), rest)


@contextmanager
def logging_disabled(module: nn.Module) -> Iterator[None]:
    """Within this, what a LightningModule logs, by `self.log` or its Trainer's loggers, is discarded.

    Upstream: lightning/pytorch/core/module.py, LightningModule.log, and lightning/pytorch/trainer/trainer.py,
    Trainer.loggers.
    Supported ways tried: none; `Trainer(logger=False)` is fixed when the Trainer is made, and `log` checks no switch.
    Removed by: a switch for logging.
    """
    modules: list[Any] = [part for part in module.modules() if isinstance(part, classes(LightningModule))]
    trainers = {id(part._trainer): part._trainer for part in modules if part._trainer is not None}.values()
    loggers = [(trainer, trainer.loggers) for trainer in trainers]
    own = [{name: vars(part)[name] for name in ("log", "log_dict") if name in vars(part)} for part in modules]
    for part in modules:
        part.log = part.log_dict = lambda *_, **__: None
    for trainer, real in loggers:
        trainer.loggers = [_discarding(logger) for logger in real]
    try:
        yield
    finally:
        for part, attributes in zip(modules, own, strict=True):
            del part.log, part.log_dict
            vars(part).update(attributes)
        for trainer, real in loggers:
            trainer.loggers = real


def _discarding(logger: Any) -> Any:
    """A logger that writes nothing, with the name and folders of the real one (DummyLogger's are empty)."""
    about = {name: getattr(logger, name, None) for name in ("name", "version", "save_dir", "log_dir", "root_dir")}
    return type("DiscardingLogger", (DummyLogger,), about)()
