"""Every place where Lightning, torch or transformers offers no hook and something of theirs is changed.

One function each, with the upstream file, why, and what upstream change would remove it. Nothing here has an effect on
a run without this package's plugin, callback or layers.
"""

import copy
import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from importlib import import_module
from typing import Any

from torch import nn

from lightning_qlora.random_state import generators, same_generators, set_generators


def keep_encoder_layers_on_the_module_path(module: nn.Module) -> None:
    """Keep nn.TransformerEncoderLayer from its fused inference path, which reads weights and never calls the layers.

    Upstream: torch/nn/modules/transformer.py, TransformerEncoderLayer.forward and TransformerEncoder.forward: the
    condition `activation_relu_or_gelu`. On that path adapters would be left out of evaluation, in silence.
    Removed by: upstream checking that `linear1` and `linear2` are plain nn.Linear.
    """
    for layer in module.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0
        if isinstance(layer, nn.TransformerEncoder):
            layer.use_nested_tensor = False


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


def introduce_the_trainer() -> None:
    """Tell a precision plugin that has `before_run(trainer)` of its Trainer, and let `weights_only` reach the file.

    Upstream: lightning/pytorch/trainer/trainer.py, Trainer._run: `configure_model` runs within the plugin's
    `module_init_context`, which knows neither Trainer nor module; and where a checkpoint is restored after the strategy
    is set up, as with the plugin, `_restore_modules_and_callbacks(ckpt_path)` lacks its second argument (2.6).
    Removed by: upstream giving `module_init_context` the module, and passing `weights_only` there too.
    """
    from lightning.pytorch import Trainer

    original: Any = Trainer._run
    if getattr(original, "introduces", False):
        return

    @wraps(original)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        connector, weights_only = self._checkpoint_connector, kwargs.get("weights_only")
        before_run = getattr(self.precision_plugin, "before_run", None)
        if callable(before_run):
            before_run(self)
        if weights_only is None or before_run is None:
            return original(self, *args, **kwargs)
        restore = partial(connector._restore_modules_and_callbacks, weights_only=weights_only)
        connector._restore_modules_and_callbacks = restore
        try:
            return original(self, *args, **kwargs)
        finally:
            del connector._restore_modules_and_callbacks

    run.introduces = True  # type: ignore[attr-defined]
    Trainer._run = run  # type: ignore[method-assign]


@contextmanager
def before_sharding(convert: Callable[[list[nn.Module]], None]) -> Iterator[None]:
    """Within this, `convert` is called with what `fully_shard` is about to shard, whatever name modules know it by.

    Upstream: torch/distributed/fsdp/_fully_shard/_fully_shard.py, fully_shard, which users call in `configure_model`
    (lightning/pytorch/strategies/model_parallel.py): when `convert_module` comes, weights are in parts already. Inside
    of it nothing can be converted, because its @contract checks that no parameter gets another name.
    Removed by: a hook between building a model and sharding it.
    """
    original: Any = import_module("torch.distributed.fsdp").fully_shard
    waiting = [convert]

    @wraps(original)
    def sharded(module: Any, *args: Any, **kwargs: Any) -> Any:
        for step in waiting:
            step([module] if isinstance(module, nn.Module) else list(module))
        return original(module, *args, **kwargs)

    _put_in_place(original, sharded)
    try:
        yield
    finally:
        waiting.clear()  # for whoever keeps it elsewhere than in a module
        _put_in_place(sharded, original)  # also in modules that were imported meanwhile


def _put_in_place(old: Any, new: Any) -> None:
    """Let every module that knows a function know another in its place.

    Upstream: torch/distributed/fsdp/_fully_shard/_fully_shard.py, as in `before_sharding`. Removed by: as there.
    """
    for held in [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]:
        for key in [key for key, value in list(held.items()) if value is old]:
            held[key] = new


def load_whole_states_of_sharded_modules() -> None:
    """Let a converted module that is sharded load the state of one file by itself, with all its checks.

    Upstream: lightning/fabric/strategies/model_parallel.py, _load_raw_module_state: loads parameter by parameter, and
    misses those that a checkpoint of adapters leaves out.
    Removed by: upstream calling the module's own load_state_dict, which torch lets take whole tensors.
    """
    upstream: Any = import_module("lightning.fabric.strategies.model_parallel")
    original = upstream._load_raw_module_state
    if getattr(original, "asks_the_module", False):
        return

    @wraps(original)
    def load(state_dict: Any, module: nn.Module, world_size: int = 1, strict: bool = True) -> None:
        if any("_qlora_frozen" in vars(part) for part in module.modules()):
            module.load_state_dict(state_dict, strict=strict)
        else:
            original(state_dict, module, world_size, strict)

    load.asks_the_module = True  # type: ignore[attr-defined]
    upstream._load_raw_module_state = load


def let_keys_be_no_attributes() -> None:
    """Let a converted module's state dict hold keys under which the module has no attribute, as fingerprints are.

    Upstream: torch/distributed/checkpoint/state_dict.py, _get_fqns: strips the prefixes of wrappers from every key by
    walking the module's attributes; keys of state dict hooks, which are written without them, end in AttributeError.
    Removed by: upstream leaving keys alone that name no attribute.
    """
    upstream: Any = import_module("torch.distributed.checkpoint.state_dict")
    original = upstream._get_fqns
    if getattr(original, "takes_any_key", False):
        return

    @wraps(original)
    def names(model: nn.Module, name: str, *args: Any, **kwargs: Any) -> set[str]:
        try:
            found: set[str] = original(model, name, *args, **kwargs)
        except AttributeError:
            if not any("_qlora_frozen" in vars(part) for part in model.modules()):
                raise
            return {name}
        return found

    names.takes_any_key = True  # type: ignore[attr-defined]
    upstream._get_fqns = names


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


def batches_from(trainer: Any, batch: Any, count: int) -> Iterator[Any]:
    """The Trainer's batch at hand and those after it, `count` at most; it will get each of them in its turn.

    A loader that draws random numbers, or says where it is for a checkpoint, does so as if nobody had looked ahead:
    when a batch comes in its turn, the generators move as they moved when it was fetched, and the loader's state is
    the one it had then.

    Upstream: lightning/pytorch/loops/fetchers.py, _DataFetcher: `__next__` takes from `batches`, filled ahead where the
    length is unknown, and from `iterator`; nothing looks ahead. CombinedLoader._state_dicts is what a checkpoint saves.
    Removed by: a fetcher with a method to peek.
    """
    fetcher = trainer.fit_loop._data_fetcher
    loader = fetcher.combined_loader
    yield batch
    ready = list(getattr(fetcher, "batches", []))[: count - 1]
    yield from (ahead for ahead, _, _ in ready)
    rest = iter(fetcher.iterator.__next__, object())  # iter(CombinedLoader) itself would begin anew
    taken: list[tuple[Any, Any, Any]] = []
    states = [copy.deepcopy(loader._state_dicts())]
    try:
        while 1 + len(ready) + len(taken) < count:
            before = generators()
            item = next(rest, None)
            if item is None:
                break
            taken.append((item, before, generators()))
            states.append(copy.deepcopy(loader._state_dicts()))
            yield item[0]
    finally:
        if taken:
            loader._state_dicts = lambda: states[0]
            fetcher.iterator = itertools.chain(_in_turn(loader, taken, states), rest)


def _in_turn(loader: Any, taken: list[tuple[Any, Any, Any]], states: list[Any]) -> Iterator[Any]:
    """See `batches_from`.

    Upstream: lightning/pytorch/utilities/combined_loader.py, as there. Removed by: as there.
    """
    for place, (item, before, after) in enumerate(taken, start=1):
        if place < len(taken):
            loader._state_dicts = lambda place=place: states[place]
        else:
            del loader._state_dicts  # its own state from here on
        if same_generators(generators(), before):
            set_generators(after)
        yield item


def rehearse(trainer: Any, batches: Iterable[Any], first_index: int) -> None:
    """Run training_step on raw batches as the loop would.

    Upstream: lightning/pytorch/loops/training_epoch_loop.py, _TrainingEpochLoop.advance: the way from a batch of the
    loader to training_step is part of the loop.
    Removed by: that way as a function of its own.
    """
    from lightning.pytorch.trainer import call

    module = trainer.lightning_module
    for index, batch in enumerate(batches, start=first_index):
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
        call._call_lightning_module_hook(trainer, "on_train_batch_start", batch, index)
        arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, index)
        # Not the strategy's: DDP's forward pass waits for a backward pass that does not come.
        with trainer.precision_plugin.train_step_context():
            call._call_lightning_module_hook(trainer, "training_step", *arguments.values())


@contextmanager
def nothing_logged(module: nn.Module) -> Iterator[None]:
    """Within this, what a LightningModule logs, itself or through its Trainer's loggers, is dropped.

    Upstream: lightning/pytorch/core/module.py, LightningModule.log, and lightning/pytorch/trainer/trainer.py,
    Trainer.loggers: a Trainer's logging can't be switched off.
    Removed by: a switch for it.
    """
    from lightning.pytorch import LightningModule

    modules: list[Any] = [part for part in module.modules() if isinstance(part, LightningModule)]
    trainers = {id(part._trainer): part._trainer for part in modules if part._trainer is not None}.values()
    loggers = [(trainer, trainer.loggers) for trainer in trainers]
    own = [{name: vars(part)[name] for name in ("log", "log_dict") if name in vars(part)} for part in modules]
    for part in modules:
        part.log = part.log_dict = lambda *_, **__: None
    for trainer, real in loggers:
        trainer.loggers = [_muted(logger) for logger in real]
    try:
        yield
    finally:
        for part, attributes in zip(modules, own, strict=True):
            del part.log, part.log_dict
            vars(part).update(attributes)
        for trainer, real in loggers:
            trainer.loggers = real


def _muted(logger: Any) -> Any:
    """A logger that says where and what it is as the real one does, and writes nothing.

    Upstream: lightning/pytorch/loggers/logger.py, DummyLogger, whose name and folders are empty. Removed by: as there.
    """
    from lightning.pytorch.loggers.logger import DummyLogger

    about = {name: getattr(logger, name, None) for name in ("name", "version", "save_dir", "log_dir", "root_dir")}
    return type("MutedLogger", (DummyLogger,), about)()


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
