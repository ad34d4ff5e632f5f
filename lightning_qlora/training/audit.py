"""Audit: what is checked of a converted module between a backward pass and the step of an optimizer.

An adapter without a gradient never trains, and nothing else would say so: its layer may be used only by code that is
not differentiable, its output may not reach the loss (a pooler), or no token may have reached it (an expert).
"""

from collections.abc import Collection, Mapping
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_qlora.activations.gradient_checkpointing import blocks_not_recomputed
from lightning_qlora.checks import KEEP_DENSE, TRAIN_IN_FULL
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.optim.adamw import PagedAdamW8bit
from lightning_qlora.survey.records import frozen_parameters
from lightning_qlora.tensors.device_types import IN_16_BITS
from lightning_qlora.tensors.dtensor import local, world_size
from lightning_qlora.texts import groups, size_text
from lightning_qlora.training.optimizers import optimizer_parameters
from lightning_qlora.training.report import ConversionReport, say

ADAM = (torch.optim.Adam, torch.optim.AdamW, PagedAdamW8bit)
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


class Audit:
    """The checks of one module, each made once for an optimizer or a parameter; its report gets what they find."""

    def __init__(self, report: ConversionReport) -> None:
        self.report = report
        self._optimizers = WeakSet[Optimizer]()  # whose first step was checked
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
        if optimizer in self._optimizers:
            return
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        if all(parameter.grad is None for parameter in parameters if id(parameter) in names):
            return
        self._optimizers.add(optimizer)
        held = {*parameters}
        layers = {}
        for name, layer in adapted_layers(module).items():
            if any(parameter in held for parameter in layer.adapter_parameters()):
                layers[name] = layer
        self._tell_what_is_unused(adapters_without_gradient(layers))
        self.report.tell(NOT_RECOMPUTED, blocks_not_recomputed(module, layers.values()))
        self.report.tell(LOST, _parameters_that_do_not_move(optimizer, names))

    def _tell_what_is_unused(self, reasons: Mapping[str, str]) -> None:
        unused = self.report.unused
        new = {name: reason for name, reason in reasons.items() if name not in unused}
        unused.update(new)
        for reason in dict.fromkeys(new.values()):
            names = [name for name, why in new.items() if why == reason]
            say(f"{len(names)} adapters got no gradient in the first step ({reason}): {groups(names)}.")
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
    lost = []
    for group in optimizer.param_groups if isinstance(optimizer, ADAM) else ():
        step = max(float(group["lr"]), float(group.get("initial_lr", 0)))  # at the end of a warmup
        for parameter in group["params"]:
            if parameter.dtype in IN_16_BITS and parameter.grad is not None and step > 0 and id(parameter) in names:
                values = local(parameter.detach())
                if ((values.float() + step).to(values.dtype) == values).any():
                    lost.append(names[id(parameter)])
    return lost
