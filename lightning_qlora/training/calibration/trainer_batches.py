"""The Trainer's next batches, read ahead and run through training_step; the Trainer trains on each of them later."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch.trainer import call

from lightning_qlora.training.calibration.patches import ReadAhead, return_to_trainer
from lightning_qlora.training.rng_state import collect_rng_states


def next_batches(trainer: Any, batch: Any, count: int) -> Iterator[Any]:
    """The Trainer's current batch and the next ones, `count` at most.

    Random numbers drawn by the loader, and its state in a checkpoint, are the same as without reading ahead: both are
    recorded here and restored when the Trainer takes the batch (`return_to_trainer`).
    """
    fetcher = trainer.fit_loop._data_fetcher
    loader = fetcher.combined_loader
    yield batch
    prefetched = list(getattr(fetcher, "batches", []))[: count - 1]
    yield from (item for item, _, _ in prefetched)
    rest = iter(fetcher.iterator.__next__, object())  # iter(CombinedLoader) itself would begin again
    taken: list[ReadAhead] = []
    states = [copy.deepcopy(loader._state_dicts())]
    try:
        while 1 + len(prefetched) + len(taken) < count:
            before = collect_rng_states()
            item = next(rest, None)
            if item is None:
                break
            taken.append(ReadAhead(item, before, collect_rng_states()))
            states.append(copy.deepcopy(loader._state_dicts()))
            yield item[0]
    finally:
        if taken:
            return_to_trainer(fetcher, taken, states, rest)


def run_training_steps(trainer: Any, batches: Iterable[Any], first_index: int) -> None:
    """Run training_step on batches of the loader, as `advance` of lightning/pytorch/loops/training_epoch_loop.py."""
    module = trainer.lightning_module
    for index, batch in enumerate(batches, start=first_index):
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
        call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, index)
        arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, index)
        # Not the strategy's training_step: DDP's forward pass would wait for a backward pass.
        with trainer.precision_plugin.train_step_context():
            call._call_lightning_module_hook(trainer, "training_step", *arguments.values())
