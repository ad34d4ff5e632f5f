"""Audit: in the first step of each optimizer, whether what it holds trains; in each step, whether frozen values do.

The first step also asks whether other code took away a method that conversion gave a module.

An adapter without a gradient never trains, and nothing else would say so: its layer may be used only by code that is
not differentiable, its output may not reach the loss (a pooler), or no token may have reached it (an expert).
"""

from collections.abc import Mapping
from weakref import WeakSet

from torch import nn
from torch.optim import Optimizer

from lightning_qlora.checks import KEEP_DENSE, TRAIN_IN_FULL
from lightning_qlora.conversion.report import ConversionReport, say
from lightning_qlora.dtypes.instance_method import check_in_place
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.optim.optimizer_parameters import optimizer_parameters
from lightning_qlora.survey.records import frozen_parameters
from lightning_qlora.tensors.device_types import IN_16_BITS
from lightning_qlora.texts import groups

UNUSED = f"not used in the loss, or its weight was read and not called; {KEEP_DENSE}"
THAWED = (
    "trains in full, although conversion, or the module before it, froze it. If this is meant, "
    f"{TRAIN_IN_FULL} from the start; if not, set requires_grad only of the parameters that had it after conversion"
)
LOST = (
    "trains in 16 bits, in which most steps of an optimizer are lost: do not cast the module after conversion, which "
    "holds what trains in full in fp32, or cast it to fp32 before"
)


class Audit:
    """The checks of one module; its report gets what they find."""

    def __init__(self, report: ConversionReport) -> None:
        self.report = report
        self._checked = WeakSet[Optimizer]()
        self._frozen: dict[int, str] = {}  # id of each parameter that conversion froze -> its name

    def before_step(self, module: nn.Module, optimizer: Optimizer) -> None:
        """Check the parameters of the module that an optimizer holds, before its first step with a gradient."""
        trains = {id(each): each for each in optimizer_parameters(optimizer) if each.requires_grad}
        if optimizer not in self._checked:
            self._before_first_step(module, optimizer, trains)
        if not self._frozen.keys().isdisjoint(trains):  # such as an encoder that thaws after an epoch
            thawed = [number for number in self._frozen if number in trains]
            self.report.tell(THAWED, [self._frozen.pop(number) for number in thawed])

    def _before_first_step(self, module: nn.Module, optimizer: Optimizer, trains: dict[int, nn.Parameter]) -> None:
        names = {id(each): name for name, each in module.named_parameters() if id(each) in trains}
        if all(trains[number].grad is None for number in names):
            return
        self._checked.add(optimizer)
        check_in_place(module.named_modules())
        layers = {
            name: layer
            for name, layer in adapted_layers(module).items()
            if any(id(each) in names for each in layer.adapter_parameters())
        }
        unused = [name for name in adapters_without_gradient(layers) if name not in self.report.unused]
        self.report.unused |= dict.fromkeys(unused, UNUSED)
        if unused:
            say(f"{len(unused)} adapters got no gradient in the first step ({UNUSED}): {groups(unused)}.")
        if len(self._checked) == 1:
            self._frozen = {id(each.parameter): each.name for each in frozen_parameters(module.named_modules())}
        self.report.tell(LOST, [name for number, name in names.items() if trains[number].dtype in IN_16_BITS])


def adapters_without_gradient(layers: Mapping[str, LoRALayer]) -> list[str]:
    """Names of layers whose adapter has no gradient, after a backward pass."""
    trained = {
        name: [parameter for parameter in layer.adapter_parameters() if parameter.requires_grad]
        for name, layer in layers.items()
    }
    return [name for name, each in trained.items() if each and all(parameter.grad is None for parameter in each)]
