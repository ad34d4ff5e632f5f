"""Every place where Lightning, torch or transformers offers no hook and something of theirs is changed.

One function each, with the upstream file, why, and what upstream change would remove it. Nothing here has an effect on
a run without this package's plugin, callback or layers.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

from torch import nn


def keep_encoder_layers_on_the_module_path(module: nn.Module) -> None:
    """Keep nn.TransformerEncoderLayer from its fused inference path, which reads weights and never calls the layers.

    Upstream: torch/nn/modules/transformer.py, TransformerEncoderLayer.forward and TransformerEncoder.forward: the
    condition `activation_relu_or_gelu`. On that path adapters would be left out of evaluation, in silence.
    Removed by: upstream checking that `linear1` and `linear2` are plain nn.Linear.
    """
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0


def let_teardown_pass_by(trainer: Any) -> None:
    """Keep teardown from moving a module that can't be moved, because its weights are on the meta device.

    Upstream: lightning/pytorch/strategies/strategy.py, Strategy.teardown, calls `lightning_module.cpu()` after any
    error; "Cannot copy out of meta tensor" would be all that a user sees of our error that names the layer.
    Removed by: upstream not letting an error of teardown hide the one that led to it.
    """
    trainer.strategy._lightning_module = None


def restore_checkpoint_after_conversion() -> None:
    """Let Lightning restore weights after `convert_module` where the precision plugin asks for it.

    Upstream: lightning/pytorch/trainer/trainer.py, Trainer._run: on one device and under DDP weights are restored
    before Strategy.setup calls convert_module; adapters can only be restored after it. Strategies say by the property
    `restore_checkpoint_after_setup` (pytorch/strategies/strategy.py) which order they want; a precision plugin can't.
    Removed by: Precision having that property too.
    """
    from lightning.pytorch.strategies import Strategy

    original: Any = Strategy.restore_checkpoint_after_setup
    if getattr(original.fget, "asks_the_plugin", False):
        return

    def fget(strategy: Strategy) -> bool:
        return original.fget(strategy) or getattr(strategy.precision_plugin, "restore_after_setup", False)

    fget.asks_the_plugin = True  # type: ignore[attr-defined]
    Strategy.restore_checkpoint_after_setup = property(fget)  # type: ignore[method-assign, assignment]


def announce_optimizers_to_fabric_callbacks() -> None:
    """Call `on_setup_optimizer(optimizer)` of Fabric callbacks that have it, for each optimizer that is set up.

    Upstream: lightning/fabric/wrappers.py, _FabricOptimizer.__init__. Fabric calls `on_after_setup` without the
    optimizers and not at all from `setup_optimizers`; `on_after_optimizer_step` comes when the first step has already
    put all optimizer state in device memory.
    Removed by: a Fabric callback hook that gets the optimizers when they are set up.
    """
    from lightning.fabric.wrappers import _FabricOptimizer

    original: Any = _FabricOptimizer.__init__
    if getattr(original, "announces", False):
        return

    @wraps(original)
    def init(self: Any, optimizer: Any, strategy: Any, callbacks: Any = None) -> None:
        original(self, optimizer, strategy, callbacks)
        for callback in callbacks or []:
            hook = getattr(callback, "on_setup_optimizer", None)
            if callable(hook):
                hook(optimizer)

    init.announces = True  # type: ignore[attr-defined]
    _FabricOptimizer.__init__ = init  # type: ignore[method-assign]


def coming_batches(trainer: Any, count: int) -> list[Any]:
    """The Trainer's next training batches, at most `count`, left in line: it will get each of them in its turn.

    Upstream: lightning/pytorch/loops/fetchers.py, _DataFetcher: `__next__` takes from `batches`, filled ahead where the
    length is unknown, and from `iterator`; nothing looks ahead. The counts of both stay as they are.
    Removed by: a fetcher with a method to peek.
    """
    fetcher = trainer.fit_loop._data_fetcher
    ready = list(getattr(fetcher, "batches", []))[:count]
    rest = iter(fetcher.iterator.__next__, object())  # iter(CombinedLoader) itself would begin anew
    taken = list(itertools.islice(rest, count - len(ready)))
    fetcher.iterator = itertools.chain(taken, rest)
    return [batch for batch, _, _ in (*ready, *taken)]


def rehearse(trainer: Any, batches: list[Any], first_index: int) -> None:
    """Run training_step on raw batches as the loop would, with nothing logged.

    Upstream: lightning/pytorch/loops/training_epoch_loop.py, _TrainingEpochLoop.advance: the way from a batch of the
    loader to training_step is part of the loop, and so is what it logs.
    Removed by: that way as a function of its own, and a Trainer whose logging can be switched off.
    """
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.trainer import call

    module, loggers = trainer.lightning_module, trainer.loggers
    module.log = module.log_dict = lambda *_, **__: None
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        for index, batch in enumerate(batches, start=first_index):
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
            call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, index)
            arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, index)
            call._call_strategy_hook(trainer, "training_step", *arguments.values())
    finally:
        del module.log, module.log_dict
        trainer.loggers = loggers


@contextmanager
def quantizer_of_transformers(
    quantizer_for: Callable[[Any], Any], around: Callable[[Any], AbstractContextManager[None]]
) -> Iterator[None]:
    """Let each `from_pretrained` run within a context of its own, and ask for a quantizer where the call names none.

    Upstream: transformers/modeling_utils.py, PreTrainedModel.from_pretrained, and in it the call of get_hf_quantizer
    (transformers/quantizers/auto.py): a quantizer comes from the call's own arguments or from the files, and a folder
    of bitsandbytes' 4 bits gets bitsandbytes' quantizer whatever is passed. Of a truncated file it says only that
    a header is incomplete, not which.
    Removed by: a context in transformers that names the quantizer of the models loaded within it.

    Args:
        quantizer_for: Model config -> an HfQuantizer, or None for transformers' own choice.
        around: Folder or name of what is to be loaded -> what the call runs within.
    """
    upstream: Any = import_module("transformers.modeling_utils")
    get_hf_quantizer, from_pretrained = upstream.get_hf_quantizer, upstream.PreTrainedModel.from_pretrained.__func__

    @wraps(get_hf_quantizer)
    def choosing(config: Any, quantization_config: Any, device_map: Any, *args: Any, **kwargs: Any) -> Any:
        named = quantization_config is not None or kwargs.get("gguf_file") is not None
        quantizer = None if named else quantizer_for(config)
        if quantizer is None:
            return get_hf_quantizer(config, quantization_config, device_map, *args, **kwargs)
        return quantizer, config, device_map

    @wraps(from_pretrained)
    def within(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        with around(pretrained_model_name_or_path):
            return from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs)

    upstream.get_hf_quantizer, upstream.PreTrainedModel.from_pretrained = choosing, classmethod(within)
    try:
        yield
    finally:
        upstream.get_hf_quantizer, upstream.PreTrainedModel.from_pretrained = (
            get_hf_quantizer, classmethod(from_pretrained),
        )  # fmt: skip
