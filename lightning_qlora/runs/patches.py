"""Changes to code and objects of Lightning and torch that training needs, where they offer no hook.

docs/patches.md says what each one changes, and why. None has an effect on a run without the plugin or our layers.
"""

import pickle
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint.state_dict
from lightning.fabric.strategies.strategy import _validate_keys_for_strict_loading
from lightning.fabric.utilities.load import _move_state_into
from torch import Tensor, nn
from torch.distributed.tensor.parallel import RowwiseParallel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_map_only

from lightning_qlora.checkpoints.module_state import ask_for
from lightning_qlora.checkpoints.run_state import leave_out_networks
from lightning_qlora.files.hub import file_in
from lightning_qlora.files.lightning_checkpoint import (
    META,
    ONLY_WEIGHTS,
    in_one_line,
    is_shards,
    keys_of_shards,
    load_shards,
    only_weights,
    read_checkpoint,
    reading,
)
from lightning_qlora.layers.derived import Derived
from lightning_qlora.layers.names import join, outer_names, owner_name, without_wrappers
from lightning_qlora.layers.packed_layer import to_parameters
from lightning_qlora.optim.saved_state import load_whole_state
from lightning_qlora.runs.base_of_rank_0 import from_rank_0, use_base_of_rank_0
from lightning_qlora.runs.guards import check_checkpoint
from lightning_qlora.survey.parts import Parts
from lightning_qlora.survey.records import conversion_of
from lightning_qlora.tensors.held_types import in_types_before
from lightning_qlora.upstream_changes import replaces, wrap_once

STYLES = "torch.distributed.tensor.parallel.style"


@replaces("lightning.pytorch.trainer.call:_call_configure_model")
def convert_before_checkpoint_is_restored(original: Any, trainer: Any) -> None:
    """Give the plugin the Trainer during `configure_model`, and convert the module right after it.

    Upstream: lightning/pytorch/trainer/call.py, _call_configure_model. Next, Trainer._run restores the checkpoint on
    one device and under DDP, and only then, in Strategy.setup, calls `convert_module`.
    Supported ways tried: callbacks have no hook there; Strategy.restore_checkpoint_after_setup also delays callbacks
    and `on_load_checkpoint`.
    Removed by: a hook of Precision between `configure_model` and the restore.
    """
    with getattr(trainer.precision_plugin, "_convert_for_trainer", nullcontext)(trainer):  # precision.py
        original(trainer)


@replaces("lightning.pytorch.strategies.strategy:Strategy.load_model_state_dict")
def convert_what_was_built_again(original: Any, strategy: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> None:
    """Let the plugin convert layers that `on_load_checkpoint` of a module built again, before weights are restored.

    Upstream: lightning/pytorch/strategies/strategy.py, load_model_state_dict, loads right after that hook.
    Supported ways tried: hooks of the module's load_state_dict, which know no plugin.
    Removed by: a hook of Precision before the restore.
    """
    convert_as_saved = getattr(strategy.precision_plugin, "_convert_as_saved", None)  # precision.py
    if convert_as_saved is not None:
        convert_as_saved(strategy.lightning_module, checkpoint)
    original(strategy, checkpoint, *args, **kwargs)


@replaces("lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop.on_run_start")
def restore_generators_after_loaders(original: Any, loop: Any, data_fetcher: Any) -> None:
    """Let the plugin restore torch's generators after the iterators of the loaders of a resumed run were made.

    Upstream: lightning/pytorch/loops/fit_loop.py, _FitLoop.setup_data, makes the iterators after
    `Precision.load_state_dict`, and these draw from the generators: the first step would have other dropout masks.
    Supported ways tried: `on_train_start` of a callback, which comes before the iterators of a new epoch, and
    `on_train_batch_start`, which comes after the first batch was computed.
    Removed by: Lightning restoring the generators, or a hook between the iterators and the first batch.
    """
    begin = partial(original, loop, data_fetcher)
    begin_epoch = getattr(loop.trainer.precision_plugin, "_begin_epoch", None)  # precision.py
    if begin_epoch is None:
        begin()
    else:
        begin_epoch(begin, loop, data_fetcher)


@replaces(
    "lightning.pytorch.trainer.connectors.checkpoint_connector:_CheckpointConnector._restore_modules_and_callbacks",
    "lightning.fabric.strategies.strategy:Strategy.load_checkpoint",
)
def restore_without_code(original: Any, owner: Any, *args: Any, **kwargs: Any) -> Any:
    """Let a run with the plugin restore a checkpoint without running code in it, unless the user says otherwise.

    Upstream: lightning/pytorch/trainer/connectors/checkpoint_connector.py and lightning/fabric/strategies/strategy.py.
    By default Lightning 2.6 runs the code of a checkpoint that it downloads, and 2.5 of any.
    Supported ways tried: a CheckpointIO, which users choose; hooks of Precision get what was read.
    Removed by: `weights_only=True` as the default of Lightning, and support for 2.5 ending.
    """
    plugin = getattr(owner, "precision", None) or owner.trainer.precision_plugin
    if not hasattr(plugin, "_convert_for_trainer"):  # precision.py
        return original(owner, *args, **kwargs)
    with reading(only_weights(None)):
        return original(owner, *args, **kwargs)


@replaces("lightning.fabric.plugins.io.torch_io:pl_load", "lightning.pytorch.core.saving:pl_load")
def load_without_code(original: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
    """Let Lightning read a checkpoint as the one says who restores it, and refuse an object in one line.

    Upstream: lightning/fabric/plugins/io/torch_io.py and lightning/pytorch/core/saving.py, by the name `pl_load`. Up to
    Lightning 2.5 their functions have no argument `weights_only`.
    Supported ways tried: TORCH_FORCE_WEIGHTS_ONLY_LOAD, which is for the whole process.
    Removed by: support for Lightning 2.5 ending.
    """
    chosen = ONLY_WEIGHTS.get()
    if chosen is None:
        return original(path, *args, **kwargs)
    if kwargs.get("weights_only") is None:
        kwargs["weights_only"] = chosen
    try:
        return original(path, *args, **kwargs)
    except pickle.UnpicklingError as error:
        raise pickle.UnpicklingError(in_one_line(path, error)) from error


@replaces(
    f"{STYLES}:ColwiseParallel._partition_linear_fn",
    f"{STYLES}:ColwiseParallel._partition_embedding_fn",
    f"{STYLES}:RowwiseParallel._partition_linear_fn",
    f"{STYLES}:RowwiseParallel._partition_embedding_fn",
)
def split_4_bit_layers_of_plans(original: Any, style: Any, name: str, module: nn.Module, mesh: Any) -> None:
    """Let ColwiseParallel and RowwiseParallel of `parallelize_module` split 4-bit layers.

    Upstream: torch/distributed/tensor/parallel/style.py, _partition_linear_fn: by outputs all parameters are split in
    dimension 0, also A and the second-level scales; by inputs `weight` and `bias` alone are split.
    Supported ways tried: a ParallelStyle of our own, which users would have to write into their plans.
    Removed by: a method of nn.Linear that splits its parameters.
    """
    if isinstance(module, Derived):
        module.split_over(mesh, isinstance(style, RowwiseParallel))
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


@replaces("lightning.fabric.strategies.model_parallel:ModelParallelStrategy.setup_module")
def split_bytes_in_fabric(original: Any, strategy: Any, module: nn.Module) -> Any:
    """Let `fully_shard` in the `parallelize_fn` of Fabric's ModelParallelStrategy split the bytes of 4-bit layers.

    Upstream: lightning/fabric/strategies/model_parallel.py, setup_module. `fully_shard` splits parameters alone, and
    Fabric's Precision does not know the strategy.
    Supported ways tried: a call in `parallelize_fn`, which every user would have to write.
    Removed by: Fabric telling its Precision plugin the strategy.
    """
    to_parameters(module)
    return original(strategy, module)


@replaces("torch.nn.parallel.distributed:_sync_module_states")
def send_bytes_of_rank_0(original: Any, *args: Any, **kwargs: Any) -> None:
    """Let DDP in a loop of your own send the 4-bit weights of rank 0, as it sends parameters.

    Upstream: torch/nn/parallel/distributed.py, DistributedDataParallel.__init__, sends parameters and buffers. Ranks
    that built their modules from other random numbers, or of which rank 0 alone loaded a file, would train one adapter
    on different bases.
    Supported ways tried: buffers, which DDP sends in each step; `convert`, in which nothing is collective.
    Removed by: DDP asking a module what else it has to send.
    """
    original(*args, **kwargs)
    use_base_of_rank_0(kwargs["module"], kwargs["process_group"])


def shard_bytes() -> None:
    """Let fully_shard of torch 2.11 and older shard 4-bit weights.

    Upstream: torch/distributed/fsdp/_fully_shard/_fsdp_param.py, FSDPParam, makes parameters that need a gradient,
    which bytes can't have, and casts bytes to the type of a MixedPrecisionPolicy (pytorch issues 177844 and 185239).
    Supported ways tried: bytes stored as floats, as bitsandbytes does; FSDP2 changes some patterns (its issue 1945).
    Removed by: support for torch 2.11 ending.
    """

    def parameter(data: Any, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(data, requires_grad and data.is_floating_point())

    def keep_bytes(original: Any, param: Any, policy: Any) -> None:
        original(param, policy)
        if not param.orig_dtype.is_floating_point:
            param.param_dtype = None

    upstream: Any = import_module("torch.distributed.fsdp._fully_shard._fsdp_param")
    upstream.nn = SimpleNamespace(**{**vars(nn), "Parameter": parameter})
    wrap_once(upstream.FSDPParam, "init_dtype_attrs", keep_bytes)


@replaces(*(f"lightning.{package}.strategies.model_parallel:_load_checkpoint" for package in ("fabric", "pytorch")))
def load_whole_tensors(original: Any, path: Any, state: Any, strict: bool = True, *args: Any, **kwargs: Any) -> Any:
    """Load a checkpoint into a sharded module: all values in it, and optimizer state by the places in the optimizer.

    Upstream: lightning/fabric/strategies/model_parallel.py, _load_checkpoint. Of one file it fails on frozen
    parameters, and takes the numbers in the optimizer's state for places among all parameters of the module. Of shards
    it reads what the state dict of a new module has, without the frozen values that changed since conversion.
    Supported ways tried: `strict_loading=False` of the module; it would also accept missing adapters.
    Removed by: upstream calling `load_state_dict` of the module, and numbering the parameters of the optimizer.
    """
    modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    if not any(map(_has_converted_part, modules.values())):
        return original(path, state, strict, *args, **kwargs)
    weights_only = only_weights(kwargs.get("weights_only"))
    if is_shards(path):
        file_in(Path(path), META)
        try:
            with ask_for(keys_of_shards(path, modules, weights_only), modules.values()), reading(weights_only):
                return original(path, state, strict, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(in_one_line(path, error)) from error
    saved = read_checkpoint(path, weights_only)
    for key, module in modules.items():
        module.load_state_dict(saved.pop(key), strict=strict)
    optimizers = {key: value for key, value in state.items() if isinstance(value, Optimizer)}
    of_trainer = None
    if kwargs.get("optimizer_states_from_list"):
        of_trainer = saved.get("optimizer_states")
    for number, (key, optimizer) in enumerate(optimizers.items()):
        if of_trainer is None:
            load_whole_state(optimizer, saved.pop(key))
        else:
            load_whole_state(optimizer, of_trainer[number])
    others = state.keys() - modules.keys() - optimizers.keys()
    _validate_keys_for_strict_loading(others, saved, strict)
    _move_state_into(saved, state, others)
    return saved


@replaces("lightning.fabric.strategies.model_parallel:_load_raw_module_state")
def load_raw_by_the_module(original: Any, state_dict: Any, module: Any, *args: Any, **kwargs: Any) -> None:
    """Let `fabric.load_raw` load a sharded module by its `load_state_dict`, which quantizes dense weights.

    Upstream: lightning/fabric/strategies/model_parallel.py, _load_raw_module_state, loads parameter by parameter: the
    4-bit layers would stay as they are with strict=False, and without it their frozen biases would be missing.
    Removed by: upstream calling `load_state_dict` of the module.
    """
    if not _has_converted_part(module):
        original(state_dict, module, *args, **kwargs)
    else:
        module.load_state_dict(state_dict, strict=kwargs.get("strict", True))


@replaces("torch.distributed.checkpoint.state_dict:_load_model_state_dict")
def load_by_the_module(original: Any, model: nn.Module, state_dict: dict[str, Any], info: Any) -> Any:
    """Let `set_model_state_dict` load into a converted module by `load_state_dict`, which checks and shards the values.

    Upstream: torch/distributed/checkpoint/state_dict.py, _load_model_state_dict. In a wrapper (DDP, torch.compile) it
    asks for every parameter, and a state of a converted module has no frozen ones. With broadcast_from_rank0 the other
    ranks get parameters and buffers alone, and not what the state says of the base.
    Supported ways tried: strict=False, which would accept missing adapters.
    Removed by: upstream leaving missing keys to `load_state_dict`, and sending every entry.
    """
    is_empty = not state_dict and not info.broadcast_from_rank0
    if not info.handle_model or is_empty or not _has_converted_part(model):
        return original(model, state_dict, info)
    state = _of_rank_0(state_dict) if info.broadcast_from_rank0 else state_dict
    module = model.module if isinstance(model, DistributedDataParallel) else model
    places = {without_wrappers(name): name for name, _ in module.named_modules(remove_duplicate=False)}
    renamed = {}
    for key, value in state.items():
        outer = next(name for name in outer_names(owner_name(key)) if name in places)
        renamed[join(places[outer], key[len(outer) :].lstrip("."))] = value
    assign = any(parameter.is_meta for parameter in module.parameters())
    return module.load_state_dict(renamed, strict=info.strict, assign=assign)


def _of_rank_0(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict of rank 0, value by value; all ranks must call it."""
    state: dict[str, Any] = {}
    for key in from_rank_0([list(state_dict)])[0]:
        (state[key],) = from_rank_0([tree_map_only(Tensor, Tensor.cpu, state_dict.get(key))])
    return state


@replaces("torch.distributed.checkpoint.state_dict:_get_model_state_dict")
def leave_out_frozen_parameters(original: Any, model: nn.Module, info: Any) -> Any:
    """Let `StateDictOptions(ignore_frozen_params=True)` leave out frozen parameters that a state has.

    Upstream: torch/distributed/checkpoint/state_dict.py, _get_model_state_dict, removes all of them: a KeyError, since
    the state of a converted module has no frozen ones.
    Removed by: `state_dict.pop(fqn, None)` there.
    """
    if not info.ignore_frozen_params or not _has_converted_part(model):
        return original(model, info)
    state = original(model, replace(info, ignore_frozen_params=False))
    module = model.module if isinstance(model, DistributedDataParallel) else model
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            state.pop(without_wrappers(name), None)
    return state


@replaces("lightning.fabric.fabric:Fabric.save")
def check_adapters_to_save(original: Any, fabric: Any, path: Any, state: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse to save adapters with NaN or Inf, as in the Trainer.

    Upstream: lightning/fabric/fabric.py, Fabric.save, asks no plugin.
    Supported ways tried: hooks of the module's state dict, which averages and copies read too.
    Removed by: a hook of Precision that gets the complete checkpoint.
    """
    for value in state.values():
        if isinstance(value, nn.Module) and _has_converted_part(value):
            Parts.of(value).check_adapters_finite()
    original(fabric, path, state, *args, **kwargs)


@replaces("lightning.fabric.strategies.model_parallel:_distributed_checkpoint_load")
def load_shards_without_code(original: Any, state: Any, path: Any) -> None:
    """Let `load_whole_tensors` read shards, and what is no tensor in them, without running code of their author.

    Upstream: lightning/fabric/strategies/fsdp.py, _distributed_checkpoint_load, as model_parallel.py calls it. It lets
    torch unpickle the index, and with weights_only=False each learning rate (default_planner.py, load_bytes).
    Supported ways tried: `weights_only` of the Trainer, which does not reach it.
    Removed by: `weights_only` of torch.distributed.checkpoint.load, and Lightning passing it on.
    """
    weights_only = ONLY_WEIGHTS.get()
    if weights_only is None:
        original(state, path)
    else:
        load_shards(state, path, weights_only)


@replaces("lightning.pytorch.trainer.connectors.checkpoint_connector:_CheckpointConnector.dump_checkpoint")
def check_complete_checkpoint(original: Any, connector: Any, *args: Any, **kwargs: Any) -> Any:
    """Let checkpoints of a converted module hold finite adapters, no second copy of the base, and the types of before.

    Upstream: lightning/pytorch/trainer/connectors/checkpoint_connector.py, dump_checkpoint, pickles `module.hparams`
    with the networks in it, and calls `on_save_checkpoint` of the module last, which may remove adapters.
    Supported ways tried: Precision.on_save_checkpoint is called before the hyperparameters are there, and not for
    checkpoints of weights only.
    Removed by: a hook of Precision that gets the complete checkpoint.
    """
    checkpoint = original(connector, *args, **kwargs)
    module = connector.trainer.lightning_module
    if _has_converted_part(module):
        check_checkpoint(module, checkpoint)
        checkpoint["state_dict"] = in_types_before(module, checkpoint["state_dict"])
    leave_out_networks(checkpoint, module)
    return checkpoint


@replaces("torch.optim.swa_utils:AveragedModel.update_parameters")
def keep_equal_frozen_values(original: Any, averaged: Any, model: nn.Module) -> None:
    """Let a frozen parameter that an average and its model have alike stay as it is.

    Upstream: torch/optim/swa_utils.py, AveragedModel.update_parameters, computes decay * p + (1 - decay) * p, which is
    rounded: after some steps the average has another embedding, and its checkpoint belongs to another base.
    Supported ways tried: `avg_fn` of the average, which Lightning's EMAWeightAveraging sets.
    Removed by: upstream averaging by lerp, as its `get_ema_multi_avg_fn` does.
    """
    equal = []
    if _has_converted_part(model):
        for ours, theirs in zip(averaged.module.parameters(), model.parameters(), strict=False):
            if not theirs.requires_grad and torch.equal(ours, theirs.detach().to(ours.device)):
                equal.append((ours, theirs))
    original(averaged, model)
    for ours, theirs in equal:
        ours.detach().copy_(theirs.detach())


def _has_converted_part(module: nn.Module) -> bool:
    return any(conversion_of(part) is not None for part in module.modules())
