"""Lightning's WeightAveraging callbacks average what trains in a converted module; they share its base."""

import copy
from typing import Any

from lightning.pytorch import Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_qlora.training.patches import replace_average


class AverageOfTrained(AveragedModel):
    """The running average of the parameters that train and of the buffers; the module's frozen parameters are shared.

    `made` is the average that the callback made before conversion, a copy of the dense module.
    """

    def __init__(self, made: AveragedModel, module: nn.Module) -> None:
        device = made.n_averaged.device
        super().__init__(nn.Module(), device, made.avg_fn, made.multi_avg_fn, made.use_buffers)
        self.module = copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})
        for tensor in (*_what_changes(self.module).parameters(), *self.module.buffers()):
            tensor.data = tensor.data.to(device)

    @override
    def update_parameters(self, model: nn.Module) -> None:
        """As in AveragedModel; the average of 4-bit bytes would be other weights, and that of frozen floats rounds."""
        whole, self.module = self.module, _what_changes(self.module)
        try:
            super().update_parameters(_what_changes(model))
        finally:
            self.module = whole


def _what_changes(module: nn.Module) -> nn.Module:
    """A module that holds only the parameters that train, and the buffers."""
    held = nn.Module()
    for index, parameter in enumerate(parameter for parameter in module.parameters() if parameter.requires_grad):
        held.register_parameter(str(index), parameter)
    for index, buffer in enumerate(module.buffers()):
        held.register_buffer(f"buffer{index}", buffer)
    return held


def average_what_trains(trainer: Trainer, module: nn.Module) -> None:
    """Let the callbacks of a Trainer that average the module (WeightAveraging) average what trains in it."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        made = vars(callback).get("_average_model")
        if isinstance(made, AveragedModel) and not isinstance(made, AverageOfTrained):
            replace_average(callback, AverageOfTrained(made, module))
