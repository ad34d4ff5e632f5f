"""Changes to code and objects of Lightning and torch that training needs, where they offer no hook.

None has an effect on a run without the plugin or our layers.
"""

from contextlib import nullcontext
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.strategies.strategy import _validate_keys_for_strict_loading
from lightning.fabric.utilities.load import _move_state_into
from torch import nn
from torch.distributed.tensor.parallel import RowwiseParallel
from torch.optim import Optimizer

from lightning_qlora.checkpoints.run_state import leave_out_networks
from lightning_qlora.files.lightning_checkpoint import is_shards, read_checkpoint
from lightning_qlora.layers.derived import Derived
from lightning_qlora.layers.packed_layer import to_parameters
from lightning_qlora.optim.saved_state import load_whole_state
from lightning_qlora.runs.guards import check_checkpoint
from lightning_qlora.runs.same_base import use_base_of_rank_0
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
    """Load a checkpoint in one file into a sharded module, and optimizer state by the places in the optimizer.

    Upstream: lightning/fabric/strategies/model_parallel.py, _load_checkpoint. Of one file it fails on frozen
    parameters, and takes the numbers in the optimizer's state for places among all parameters of the module.
    Supported ways tried: `strict_loading=False` of the module; it would also accept missing adapters.
    Removed by: upstream calling `load_state_dict` of the module, and numbering the parameters of the optimizer.
    """
    modules = {key: value for key, value in state.items() if isinstance(value, nn.Module)}
    if is_shards(path) or not any(map(_has_converted_part, modules.values())):
        return original(path, state, strict, *args, **kwargs)
    saved = read_checkpoint(path, kwargs.get("weights_only") is not False)
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
