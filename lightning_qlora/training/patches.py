"""Changes to code and objects of Lightning, torch and transformers that training needs, where they offer no hook.

One function for each change, with the upstream file, the reason, the supported ways that were tried, and the upstream
change that would remove it. None of them has an effect on a run without this package's plugin or layers. A change to
Lightning is also made to its copies (`lightning_copies`).
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import wraps
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.tensor.parallel import RowwiseParallel
from torch.optim import Optimizer
from torch.torch_version import TorchVersion

from lightning_qlora.adapters.module_state import CONFIG_KEY, conversion_of
from lightning_qlora.files.lightning_checkpoint import is_shards, names_in_shards, read_checkpoint
from lightning_qlora.layers.dotted_names import key_name, last_part, owner_name
from lightning_qlora.layers.dtensor import clip_grad_norm
from lightning_qlora.layers.patches import replaces, wrap_once
from lightning_qlora.layers.qlora_linear import QLoRALinear, adapted_layers
from lightning_qlora.layers.records import unrecorded
from lightning_qlora.layers.tensor_parallel import split
from lightning_qlora.layers.trainable_tokens import SPLIT_TOKENS, TrainableTokens
from lightning_qlora.lightning_copies import classes
from lightning_qlora.optim.adamw import load_whole_state
from lightning_qlora.optim.state_8bit import is_8bit
from lightning_qlora.training.guards import check_checkpoint
from lightning_qlora.training.module_hyperparameters import leave_out_networks
from lightning_qlora.training.report import parameter_bytes, weights_minus_elements

STYLES, BY_DIMENSION = "torch.distributed.tensor.parallel.style", ("ColwiseParallel", "RowwiseParallel")
SUMMARY = "lightning.pytorch.utilities.model_summary.model_summary"


def recompute_block(block: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the forward pass of a module by one that is recomputed in the backward pass.

    Upstream: torch/utils/checkpoint.py, checkpoint: the code that calls a module has to call it instead.
    Supported ways tried: torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py puts a module around the block,
    which renames its parameters in state dicts, patterns and reports; `gradient_checkpointing_enable` of transformers,
    whose layers recompute themselves in training mode alone (transformers/modeling_layers.py).
    Removed by: a switch of nn.Module for gradient checkpointing.
    """
    block.forward = forward
    if getattr(block, "gradient_checkpointing", False):
        block.gradient_checkpointing = False  # type: ignore[assignment]  # transformers would recompute it again


def skip_moving_meta_module_at_teardown(trainer: Any) -> None:
    """Keep the Trainer's teardown from moving a module whose weights are on the meta device to the CPU.

    Upstream: lightning/pytorch/strategies/strategy.py, Strategy.teardown, calls `lightning_module.cpu()` after any
    error; that raises "Cannot copy out of meta tensor" and hides our error, which names the layer.
    Supported ways tried: none; every strategy calls Strategy.teardown.
    Removed by: upstream raising the first error when teardown fails too.
    """
    trainer.strategy._lightning_module = None


def replace_average(callback: Any, average: nn.Module) -> None:
    """Give a WeightAveraging callback another average than the one that it made of the module before conversion.

    Upstream: lightning/pytorch/callbacks/weight_averaging.py, WeightAveraging.setup, copies the module in the first
    hook of a run, and later averages, swaps and saves the parameters of the copy.
    Supported ways tried: `avg_fn` gets single tensors and would also average 4-bit bytes; a subclass of the callback
    could make the copy later, but LightningCLI and existing code name upstream's classes.
    Removed by: upstream making the copy after Strategy.setup.
    """
    callback._average_model = average


@replaces("lightning.pytorch.trainer.call:_call_configure_model")
def convert_before_checkpoint_is_restored(original: Any, trainer: Any) -> None:
    """Give the plugin the Trainer during `configure_model`, and convert the module right after it.

    Upstream: lightning/pytorch/trainer/call.py, _call_configure_model. Next, Trainer._run restores the checkpoint (on
    one device and under DDP), and later, in Strategy.setup, calls `convert_module`; but adapters can only be loaded
    into a converted module. `module_init_context`, entered for `configure_model`, gets neither Trainer nor module.
    Supported ways tried: a callback of the entry point `lightning.pytorch.callbacks_factory` gets the Trainer in its
    `setup`, but no hook of a callback runs between `configure_model` and the restore, and it would be added to every
    Trainer of the environment; Strategy.restore_checkpoint_after_setup also delays callbacks and `on_load_checkpoint`.
    Removed by: a hook of Precision between `configure_model` and the restore.
    """
    with getattr(trainer.precision_plugin, "convert_for_trainer", nullcontext)(trainer):
        original(trainer)


def requeue_between_batches(trainer: Any) -> None:
    """Let the checkpoint of a SLURM job that is queued again be saved between two batches, by all ranks together.

    Upstream: lightning/pytorch/trainer/connectors/signal_connector.py, _SignalConnector._slurm_sigusr_handler_fn, saves
    in the signal handler, at another place of a step on each rank: a rank waits for the random states of one that waits
    for its gradients, and half of an optimizer step may be saved (pytorch-lightning issue 21406).
    Supported ways tried: `SLURMEnvironment(auto_requeue=False)` and a callback with a signal handler of its own, which
    every user would have to write.
    Removed by: pytorch-lightning pull request 21407, if all ranks then save after the same batch.
    """
    connector, environment = trainer._signal_connector, trainer._accelerator_connector.cluster_environment
    requeues = isinstance(environment, classes(SLURMEnvironment)) and environment.auto_requeue
    if not requeues or "_slurm_sigusr_handler_fn" in vars(connector):
        return
    save, received = connector._slurm_sigusr_handler_fn, []

    def handle(signum: Any, frame: Any) -> None:
        received.append(signum) if trainer.state.fn == TrainerFn.FITTING else save(signum, frame)

    def after_batch(*_: Any) -> None:
        if trainer.strategy.reduce_boolean_decision(trainer.is_global_zero and bool(received), all=False):
            received.clear()
            save(environment.requeue_signal, None)

    connector._slurm_sigusr_handler_fn = handle
    trainer.callbacks.append(LambdaCallback(on_train_batch_end=after_batch))


@replaces("lightning.fabric.strategies.strategy:Strategy.clip_gradients_norm")
def clip_gradients_of_fabric(
    original: Any, strategy: Any, module: nn.Module, optimizer: Optimizer, *args: Any, **kwargs: Any
) -> Any:
    """Let `fabric.clip_gradients(max_norm=...)` clip layers that a plan splits over ranks together with others.

    And let it raise nothing for infinite gradients in fp16, whose step is skipped.

    Upstream: lightning/fabric/strategies/strategy.py, Strategy.clip_gradients_norm: torch's clip_grad_norm_ takes no
    DTensors beside other tensors, and none of several meshes; `error_if_nonfinite` is True unless the user knows of it.
    Supported ways tried: `Precision.main_params`, which only chooses what is clipped. The Trainer calls
    `Precision.clip_grad_by_norm`, which the plugin has.
    Removed by: clip_grad_norm_ of torch taking them.
    """
    if not _is_converted(module):
        return original(strategy, module, optimizer, *args, **kwargs)
    strategy.precision.unscale_gradients(optimizer)
    if getattr(strategy.precision, "loss_scale", None) is not None:
        kwargs["error_if_nonfinite"] = False
    return clip_grad_norm(strategy.precision.main_params(optimizer), *args, **kwargs)


@replaces(*(f"{STYLES}:{style}._partition_{kind}_fn" for style in BY_DIMENSION for kind in ("linear", "embedding")))
def split_4_bit_layers_of_plans(original: Any, style: Any, name: str, module: nn.Module, mesh: Any) -> None:
    """Let ColwiseParallel and RowwiseParallel of `parallelize_module` split 4-bit layers.

    Upstream: torch/distributed/tensor/parallel/style.py, _partition_linear_fn: by outputs all parameters are split in
    dimension 0, also A and the second-level scales; by inputs `weight` and `bias` alone are split.
    Supported ways tried: a ParallelStyle of our own, which users would have to write into their plans; the layer's own
    `register_parameter`, which sees what a style made of one parameter after the other.
    Removed by: a method of nn.Linear that splits its parameters.
    """
    if isinstance(module, QLoRALinear):
        split(module, mesh, isinstance(style, RowwiseParallel))
    elif isinstance(module, TrainableTokens):
        raise ValueError(SPLIT_TOKENS)
    else:
        original(style, name, module, mesh)


@replaces(*([f"{STYLES}:distribute_module"] if torch.__version__ < TorchVersion("2.11") else []))
def keep_frozen_while_distributed(original: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Let frozen parameters stay frozen in a module that `parallelize_module` of torch 2.10 and older distributes.

    Upstream: torch/distributed/tensor/_api.py, distribute_module, makes all that it distributes trainable.
    Removed by: support for torch 2.10 ending.
    """
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    original(module, *args, **kwargs)
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    return module


@contextmanager
def before_sharding(convert: Callable[[list[nn.Module]], None]) -> Iterator[None]:
    """Within this, `convert` is called with the modules that `fully_shard` or `parallelize_module` is about to split.

    Upstream: torch/distributed/fsdp/_fully_shard/_fully_shard.py and torch/distributed/tensor/parallel/api.py, which
    users call in `configure_model` (lightning/pytorch/strategies/model_parallel.py): at `convert_module` the weights
    are sharded already. They are replaced in every module that imported them. A module can't be converted inside
    fully_shard: its @contract checks that no parameter gets another name.
    Supported ways tried: none; they call no hook.
    Removed by: a hook between building a model and sharding it.
    """
    steps = [convert]

    def converting(original: Any) -> Any:
        @wraps(original)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            for step in steps:
                step([module] if isinstance(module, nn.Module) else list(module))
            return original(module, *args, **kwargs)

        return call

    upstream: list[Any] = [
        import_module("torch.distributed.fsdp").fully_shard,
        import_module("torch.distributed.tensor.parallel").parallelize_module,
    ]
    replaced = [(original, converting(original)) for original in upstream]
    for original, call in replaced:
        _replace_in_all_modules(original, call)
    try:
        yield
    finally:
        steps.clear()  # some object other than a module may still refer to them
        for original, call in replaced:
            _replace_in_all_modules(call, original)


def _replace_in_all_modules(old: Any, new: Any) -> None:
    """Replace a function in the namespace of every imported module; see `before_sharding`."""
    for namespace in [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]:
        for key in [key for key, value in list(namespace.items()) if value is old]:
            namespace[key] = new


def shard_bytes() -> None:
    """Let fully_shard of torch 2.11 and older shard 4-bit weights.

    Upstream: torch/distributed/fsdp/_fully_shard/_fsdp_param.py, FSDPParam: `_init_sharded_param` and
    `to_sharded_post_forward` make a parameter that needs a gradient, which bytes can't have, before they freeze it, and
    `init_dtype_attrs` casts bytes to the type of a MixedPrecisionPolicy (pytorch issues 177844 and 185239).
    Supported ways tried: bytes stored as floats, as bitsandbytes does; FSDP2 changes some patterns (its issue 1945).
    Removed by: support for torch 2.11 ending.
    """
    if torch.__version__ >= TorchVersion("2.12"):
        return

    def parameter(data: Any, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(data, requires_grad and data.is_floating_point())

    def keep_bytes(original: Any, param: Any, policy: Any) -> None:
        original(param, policy)
        if not param.orig_dtype.is_floating_point:
            param.param_dtype = None

    upstream: Any = import_module("torch.distributed.fsdp._fully_shard._fsdp_param")
    upstream.nn = SimpleNamespace(**{**vars(nn), "Parameter": parameter})
    wrap_once(upstream.FSDPParam, "init_dtype_attrs", keep_bytes)


@replaces("lightning.fabric.strategies.model_parallel:_load_raw_module_state")
def load_full_state_dicts_into_sharded_modules(
    original: Any, state_dict: Any, module: nn.Module, world_size: int = 1, strict: bool = True
) -> None:
    """Load a checkpoint in one file into a converted module that is sharded by the module's own load_state_dict.

    Upstream: lightning/fabric/strategies/model_parallel.py, _load_raw_module_state, loads parameter by parameter and
    fails on those that a checkpoint of adapters does not contain.
    Supported ways tried: `strict_loading=False` of the LightningModule; it would also accept missing adapters.
    Removed by: upstream calling load_state_dict of the module, which accepts whole tensors.
    """
    if _is_converted(module):
        module.load_state_dict(state_dict, strict=strict)
    else:
        original(state_dict, module, world_size, strict)


@replaces(*(f"lightning.{package}.strategies.model_parallel:_load_checkpoint" for package in ("fabric", "pytorch")))
def load_optimizer_states_as_saved(original: Any, path: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    """Load optimizer state into sharded parameters from one file, and 8-bit state from any number of shards.

    Upstream: lightning/fabric/strategies/model_parallel.py, _load_checkpoint, takes the numbers in the state for places
    among the parameters of the module; they are places in the optimizer, which may hold the trained ones alone. And
    torch/distributed/checkpoint loads scales of 8-bit state only into as many as were saved.
    Supported ways tried: none; the strategy calls no hook between reading the file and `set_optimizer_state_dict`.
    Removed by: upstream numbering the parameters of the optimizer, and a hook of Optimizer for resharding its state.
    """
    optimizers = {key: value for key, value in state.items() if isinstance(value, Optimizer)}
    converted = any(_is_converted(value) for value in state.values() if isinstance(value, nn.Module))
    in_shards, weights_only = is_shards(path), kwargs.get("weights_only") is not False
    in_8bit = in_shards and any(is_8bit({last_part(name): 0}) for name in names_in_shards(path, weights_only))
    if not converted or (in_shards and not in_8bit):
        return original(path, state, *args, **kwargs)
    rest = {key: value for key, value in state.items() if key not in optimizers}
    left = original(path, rest, *args, **kwargs)
    state.update(rest)
    saved = read_checkpoint(path, weights_only, optimizers) if in_shards else left
    of_trainer = saved.get("optimizer_states") if kwargs.get("optimizer_states_from_list") else None
    for number, (key, optimizer) in enumerate(optimizers.items()):
        load_whole_state(optimizer, saved.pop(key) if of_trainer is None else of_trainer[number])
    return left


@replaces("lightning.fabric.plugins.io.torch_io:TorchCheckpointIO.load_checkpoint")
def load_shards_on_one_device(original: Any, io: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint of a converted module in shards under a strategy that does not shard.

    Upstream: lightning/fabric/plugins/io/torch_io.py, TorchCheckpointIO.load_checkpoint, opens the folder as a file.
    Supported ways tried: `python -m lightning.pytorch.utilities.consolidate_checkpoint`, which reads FSDP1's names only
    (KeyError: 'model'); another CheckpointIO, which the user passes beside the plugin.
    Removed by: TorchCheckpointIO reading both kinds of checkpoint that Lightning writes.
    """
    if is_shards(path):
        weights_only = kwargs.get("weights_only") is not False
        if any(last_part(name) == CONFIG_KEY for name in names_in_shards(path, weights_only)):
            return read_checkpoint(path, weights_only)
    return original(io, path, *args, **kwargs)


@replaces("torch.distributed.checkpoint.state_dict:_get_fqns")
def allow_keys_without_attributes(original: Any, model: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Accept keys in the state dict of a converted module that are not names of its attributes, such as fingerprints.

    Upstream: torch/distributed/checkpoint/state_dict.py, _get_fqns, follows the module's attributes to remove the
    prefixes of wrappers from every key; a key that a state dict hook added raises AttributeError.
    Supported ways tried: `_extra_state`, whose key upstream accepts; torch saves it only for classes that define
    `get_extra_state`, and the root, which holds the configuration and a fingerprint, is the user's module.
    Removed by: upstream keeping keys that name no attribute.
    """
    try:
        return original(model, name, *args, **kwargs)
    except AttributeError:
        if not _is_converted(model):
            raise
        return {name}


@replaces("lightning.pytorch.trainer.connectors.checkpoint_connector:_CheckpointConnector.dump_checkpoint")
def check_complete_checkpoint(original: Any, connector: Any, *args: Any, **kwargs: Any) -> Any:
    """Let checkpoints of a converted module hold finite adapters, and no second copy of the base in hyperparameters.

    Upstream: lightning/pytorch/trainer/connectors/checkpoint_connector.py, dump_checkpoint, puts `module.hparams` into
    the checkpoint, with every network that `save_hyperparameters` found, and pickles it. Its last call is
    `on_save_checkpoint` of the module, which may remove adapters.
    Supported ways tried: Precision.on_save_checkpoint is called before the hyperparameters are there, and not for
    checkpoints of weights only; `on_save_checkpoint` and `hparams` belong to the user's module, whose code may read
    `self.hparams.net`.
    Removed by: a hook of Precision that gets the complete checkpoint.
    """
    checkpoint = original(connector, *args, **kwargs)
    module = connector.trainer.lightning_module
    if _is_converted(module):
        check_checkpoint(module, checkpoint)
    leave_out_networks(checkpoint, module)
    return checkpoint


@replaces(
    f"{SUMMARY}:LayerSummary.num_parameters", f"{SUMMARY}:ModelSummary.total_parameters",
    f"{SUMMARY}:ModelSummary.model_size",
)  # fmt: skip
def count_weights_in_model_summary(original: Any, summary: Any) -> Any:
    """Let Lightning's ModelSummary count the weights of 4-bit layers, and the bytes that all parameters really take.

    Upstream: lightning/pytorch/utilities/model_summary/model_summary.py: LayerSummary.num_parameters and
    ModelSummary.total_parameters count the elements of the packed tensors; ModelSummary.model_size multiplies them by
    the bytes of the Trainer's precision.
    Supported ways tried: none; the callback chooses its summary class by the strategy (DeepSpeedSummary).
    Removed by: ModelSummary asking a module for its number of parameters and bytes.
    """
    module = summary._module if hasattr(summary, "_module") else summary._model
    if original.__name__ == "model_size":
        return parameter_bytes(module) / 1e6 if _is_converted(module) else original(summary)
    return original(summary) + weights_minus_elements(module)


@replaces("transformers.modeling_utils:PreTrainedModel.num_parameters")
def count_weights_in_transformers(
    original: Any, model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> Any:
    """Let `num_parameters()` of a transformers model count the weights of 4-bit layers, if transformers is loaded.

    Upstream: transformers/modeling_utils.py, PreTrainedModel.num_parameters, which counts elements; it knows 4-bit
    weights only as bitsandbytes' Params4bit.
    Supported ways tried: none; an HfQuantizer is not asked.
    Removed by: num_parameters asking the quantizer, or the module, for the number of weights.
    """
    more = 0 if only_trainable else weights_minus_elements(model)
    return original(model, only_trainable, exclude_embeddings) + more


@replaces("torch.nn:Module.load_state_dict")
def explain_adapter_checkpoints(original: Any, module: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    """Let a module that is not converted refuse the state of a converted one, and say how to load it.

    Upstream: torch/nn/modules/module.py, Module.load_state_dict, which LightningModule.load_from_checkpoint
    (lightning/pytorch/core/saving.py) and a Trainer without the plugin call: it lists missing and unexpected keys, and
    with strict=False returns a module without the adapters.
    Supported ways tried: `on_load_checkpoint` belongs to the user's module, and is none of other modules.
    Removed by: a hook of Lightning for the state of a plugin that is not used, and of torch for state dicts.
    """
    if CONFIG_KEY in state_dict and (convert := _converting.get()) and conversion_of(module) is None:
        convert(module, state_dict)
    if CONFIG_KEY in state_dict and conversion_of(module) is not None:
        _convert_what_was_built_anew(module, state_dict)
    held = {last_part(str(key)) for key in state_dict}
    of_layers = "lora_A" in held and not held.isdisjoint(("fingerprint", "absmax"))  # also of a part
    # A conversion may have found no layer that is large enough; then everything trains in full.
    if not adapted_layers(module) and (of_layers or (CONFIG_KEY in held and not _is_converted(module))):
        name = type(module).__name__
        if conversion_of(module) is not None:
            raise ValueError(
                f"This state dict holds adapters, and the layers of this {name} were built anew after conversion, so "
                "it has none. Leave out what builds them again (setup, or on_load_checkpoint that calls it)."
            )
        what = f"This state dict holds the adapters of a converted module, and this {name} is not converted. "
        if not isinstance(module, classes(LightningModule)):
            raise ValueError(
                f"{what}Call lightning_qlora.convert with the arguments of the training before; for code that "
                "loads into the dense module, call lightning_qlora.merge before it saves."
            )
        raise ValueError(
            f"{what}Use lightning_qlora.load_from_checkpoint({name}, PATH), or "
            "Trainer(plugins=QLoRAPrecision(...)) with the arguments of the training, which converts the module "
            "before it restores the checkpoint."
        )
    return original(module, state_dict, *args, **kwargs)


def _convert_what_was_built_anew(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Convert layers that replaced converted ones before a Trainer restores a checkpoint.

    `on_load_checkpoint` may call `setup` again, which builds the model again.
    """
    adapters = {owner_name(key) for key in state_dict if last_part(str(key)) == "lora_A"}
    trainer: Any = vars(module).get("_trainer")
    convert = getattr(getattr(trainer, "precision_plugin", None), "convert_again", None)
    if convert is None or adapters <= {key_name(name) for name in adapted_layers(module)}:
        return
    if trainer.strategy.restore_checkpoint_after_setup or not unrecorded(module):
        return
    convert(module)


_converting: ContextVar[Callable[[nn.Module, Any], None] | None] = ContextVar("converting", default=None)


@contextmanager
def converting_what_loads(convert: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Within this, `convert` is called with the module that loads the state of a converted one, and that state.

    Upstream: lightning/pytorch/core/saving.py, _load_state, loads right after `on_load_checkpoint`.
    Supported ways tried: to load after it returned; then edits of the state by hooks and methods of the class are lost.
    Removed by: a hook of Lightning between building a module and loading its state.
    """
    token = _converting.set(convert)
    try:
        yield
    finally:
        _converting.reset(token)


def _is_converted(module: nn.Module) -> bool:
    return any(conversion_of(part) is not None for part in module.modules())
