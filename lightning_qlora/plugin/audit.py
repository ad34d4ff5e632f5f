"""Audit: what is checked of a converted module between a backward pass and the step of an optimizer.

An adapter without a gradient never trains, and nothing else would say so: its layer may be used only by code that is
not differentiable, its output may not reach the loss (a pooler), or no token may have reached it (an expert).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_qlora.activations.gradient_checkpointing import blocks_not_recomputed
from lightning_qlora.checks import KEEP_DENSE, TRAIN_IN_FULL
from lightning_qlora.conversion.outside_copies import COMPUTED, WRITTEN, OutsideCopies, parameters_of_optimizers
from lightning_qlora.conversion.report import ConversionReport, say
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.optim.optimizer_parameters import layers_with_base_of, optimizer_parameters
from lightning_qlora.selection.copies import is_comparable, moved_towards, sample
from lightning_qlora.survey.records import frozen_parameters
from lightning_qlora.tensors.device_types import IN_16_BITS
from lightning_qlora.tensors.dtensor import local, world_size
from lightning_qlora.texts import groups, size_text

ADAM = (torch.optim.Adam, torch.optim.AdamW)
UNUSED = "not used in the loss"
READ = f"the weight was read, but no gradient came back: call the layer, or {KEEP_DENSE}"
NOT_RECOMPUTED = (
    "gradient_checkpointing saves no memory here, because the forward method was not called in the first step, so "
    "nothing was recomputed"
)
THAWED = (
    "train from now on, in full, and are in checkpoints. Conversion froze them, or the module before it. If this is "
    f"meant, {TRAIN_IN_FULL} from the start, or linear layers in target_modules, for 4 bits and adapters; if not, set "
    "requires_grad only of the parameters that had it after conversion, as those with 'lora_' in their names"
)
LOST = (
    "train in 16 bits, and have elements that do not move, because a step, about the learning rate, is smaller than "
    "half of their last bit: do not cast the module after conversion, which holds what trains in full in fp32; "
    f"{TRAIN_IN_FULL}, if you make them trainable; or cast them to fp32 before conversion"
)
TARGET = (
    "{}: other code lets their adapters follow those of {}, by an average of parameters. The 4-bit weights of both are "
    "different and stay so, so the target never reaches the module that it follows. Name both in modules_to_save, "
    "which trains them in full, or make the target a copy.deepcopy of the other one."
)


@dataclass
class _Idle:
    """Layers whose adapters had no gradient in any step of an optimizer."""

    layers: dict[str, LoRALayer]
    of_optimizer: set[str]  # names of those that the optimizer holds
    steps: int = 1
    told: bool = False
    values: dict[str, Any] = field(default_factory=dict)  # some of B in the second step, which may initialize adapters


class Audit:
    """The checks of one module, each made once for an optimizer or a parameter; its report gets what they find."""

    def __init__(self, report: ConversionReport, outside: OutsideCopies | None = None) -> None:
        self.report = report
        self.outside = outside
        self._idle = WeakKeyDictionary[Optimizer, _Idle]()
        self._trained = set[int]()  # ids of the parameters that took a step

    def before_step(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Check the parameters of the module that an optimizer holds; adapters of other optimizers are not judged.

        A GAN trains those by another loss.
        """
        parameters = optimizer_parameters(optimizer)
        trained = {id(parameter) for parameter in parameters if parameter.requires_grad}
        if not trained <= self._trained:
            self._tell_what_was_thawed(module, trained - self._trained)
            self._trained |= trained
        if self.outside is not None:
            self.report.tell(COMPUTED, self.outside.computed_with())
            if self.outside.are_written(module):
                self.report.tell(WRITTEN, [self.outside.place])
        if optimizer in self._idle:
            self._follow(self._idle[optimizer], module, optimizer)
            return
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        if all(parameter.grad is None for parameter in parameters if id(parameter) in names):
            return
        every = adapted_layers(module)
        of_optimizer = _layers_of(parameters, every)
        of_others = [parameter for other in self._idle for parameter in optimizer_parameters(other)]
        idle = adapters_without_gradient(every).keys() - (_layers_of(of_others, every) - of_optimizer)
        self._idle[optimizer] = _Idle({name: every[name] for name in every if name in idle}, of_optimizer)
        if world_size() > 1:  # the next forward pass of DDP may fail because of them
            self._tell_what_is_unused(self._idle[optimizer], module)
        self.report.tell(NOT_RECOMPUTED, blocks_not_recomputed(module, [every[name] for name in of_optimizer]))
        self.report.tell(LOST, _parameters_that_do_not_move(optimizer, names))

    def end(self, module: nn.Module) -> None:
        for idle in self._idle.values():
            self._tell_what_is_unused(idle, module)

    def _follow(self, idle: _Idle, module: nn.Module, optimizer: Optimizer) -> None:
        """Look again at layers whose adapters had no gradient: it may come later, and other code may write to them."""
        idle.steps += 1
        if not idle.layers:
            return
        idle.layers = {name: layer for name, layer in idle.layers.items() if isinstance(layer, LoRALayer)}  # not merged
        for name in idle.layers.keys() - adapters_without_gradient(idle.layers).keys():
            del idle.layers[name]
            self.report.unused.pop(name, None)
        self._tell_what_is_unused(idle, module)
        if idle.steps == 2:
            whole = {name: layer for name, layer in idle.layers.items() if is_comparable(layer.lora_B)}
            idle.values = {name: sample(layer.lora_B) for name, layer in whole.items()}
        elif idle.steps == 3 or idle.steps & (idle.steps - 1) == 0:
            _check_targets(idle, adapted_layers(module), optimizer)

    def _tell_what_is_unused(self, idle: _Idle, module: nn.Module) -> None:
        """Tell it once; not of copies of layers that train, which follow them by an average."""
        if idle.told or not idle.layers:
            return
        idle.told = True
        every = adapted_layers(module)
        reasons = adapters_without_gradient(
            {name: idle.layers[name] for name in idle.layers if name in idle.of_optimizer}
        )
        copies = layers_with_base_of(every.keys() - idle.layers.keys(), every)
        unused = self.report.unused
        new = {name: reason for name, reason in reasons.items() if name not in unused and name not in copies}
        unused.update(new)
        for reason in dict.fromkeys(new.values()):
            names = [name for name, why in new.items() if why == reason]
            say(f"{len(names)} adapters got no gradient in the first steps ({reason}): {groups(names)}.")
        if new and world_size() > 1:
            say("DistributedDataParallel needs strategy='ddp_find_unused_parameters_true' for this.")

    def _tell_what_was_thawed(self, module: nn.Module, new: Collection[int]) -> None:
        """Tell of frozen parameters that train from this step on, as after `unfreeze()`; `new` are their ids."""
        thawed: dict[nn.Parameter, str] = {}
        for name, _, _, parameter, _ in frozen_parameters(module.named_modules()):
            if id(parameter) in new:
                thawed.setdefault(parameter, name)
        size = size_text(sum(parameter.nbytes for parameter in thawed))
        self.report.tell(f"{len(thawed)} parameters ({size}) {THAWED}", thawed.values())


def _layers_of(parameters: Iterable[nn.Parameter], layers: Mapping[str, LoRALayer]) -> set[str]:
    ids = {*map(id, parameters)}
    return {name for name, layer in layers.items() if any(id(each) in ids for each in layer.adapter_parameters())}


def _check_targets(idle: _Idle, layers: Mapping[str, LoRALayer], optimizer: Optimizer) -> None:
    """RuntimeError for adapters that get no gradient, and follow those of layers with other 4-bit weights."""
    followed = {}
    for name, before in idle.values.items():
        layer = idle.layers.get(name)
        after = None if layer is None else sample(layer.lora_B)
        if after == before:
            continue
        for other in layers.keys() - idle.layers.keys():
            leader = layers[other].lora_B
            if is_comparable(leader) and moved_towards(before, after, sample(leader)):
                followed[name] = other
    if not followed:
        return
    trained = parameters_of_optimizers(optimizer)
    copies = layers_with_base_of(followed.values(), layers)
    wrong = [name for name in followed if name not in copies and id(layers[name].lora_B) not in trained]
    idle.values = {}
    if wrong:
        raise RuntimeError(TARGET.format(groups(wrong), groups(followed[name] for name in wrong)))


def adapters_without_gradient(layers: Mapping[str, LoRALayer]) -> dict[str, str]:
    """Name of each layer whose adapter has no gradient, after a backward pass -> the reason."""
    reasons = {}
    for name, layer in layers.items():
        trains = [parameter for parameter in layer.adapter_parameters() if parameter.requires_grad]
        if trains and all(parameter.grad is None for parameter in trains):
            reasons[name] = READ if layer.is_only_read else UNUSED
    return reasons


def _parameters_that_do_not_move(optimizer: Optimizer, names: Mapping[int, str]) -> list[str]:
    """Names of 16-bit parameters in which a step of Adam, about a learning rate, is lost: p + lr, rounded, is p."""
    lost: list[str] = []
    if not (isinstance(optimizer, ADAM) or getattr(optimizer, "steps_by_learning_rate", False)):
        return lost
    for group in optimizer.param_groups:
        step = max(float(group["lr"]), float(group.get("initial_lr", 0)))  # at the end of a warmup
        for parameter in group["params"]:
            if parameter.dtype in IN_16_BITS and parameter.grad is not None and step > 0 and id(parameter) in names:
                values = local(parameter.detach())
                if ((values.float() + step).to(values.dtype) == values).any():
                    lost.append(names[id(parameter)])
    return lost
