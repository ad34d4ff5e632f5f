"""InputStatistics: what an adapter that is initialized from data ("calibrated") needs until then.

The layer and its copies share one: a copy is the same layer, so it begins with the same values, which
`training/calibration.py` computes.
"""

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_qlora.layers.initialization import solver_device
from lightning_qlora.layers.packed_linear import PackedLayer


class InputStatistics:
    """The float weight of a layer, and sums over its inputs.

    Attributes:
        dense_weight: [out, in], of a stack [experts, out, in], in host memory; on the meta device: another rank has it.
        sums: fp64 [matrices, in + 2]: of each matrix the squares of each input, the number of finite rows, and of all.
        calibration: The `Calibration` of the conversion that made the layer.
    """

    def __init__(self, dense_weight: Tensor, matrices: int, inputs: int, device: torch.device) -> None:
        self.dense_weight = dense_weight
        self.sums = torch.zeros(matrices, inputs + 2, dtype=torch.float64, device=solver_device(device))
        self.calibration: Any = None
        self._layers: list[ref[nn.Module]] = []  # in the order in which they were made, the same on all ranks

    def __deepcopy__(self, memo: Any) -> "InputStatistics":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_layers": []}

    @property
    def layers(self) -> list[Any]:
        """The layer and its copies."""
        layers = [each() for each in self._layers]
        return [layer for layer in layers if layer is not None]

    def join(self, layer: nn.Module) -> None:
        """Add a layer, which has the weight."""
        self._layers.append(ref(layer))

    def leave(self, layer: nn.Module) -> None:
        """Remove a layer, whose adapter got its values."""
        self._layers = [each for each in self._layers if each() not in (layer, None)]
        if not self._layers and self.calibration is not None:
            self.calibration.remove(self)  # training/calibration.py

    def leave_to_another_rank(self) -> None:
        """Free the weight: another rank has it, and computes the values of the adapter."""
        self.dense_weight = self.dense_weight.to("meta")

    def to(self, device: torch.device) -> None:
        """Move the sums with a layer, whose weight may have been read after it was on the meta device."""
        device = solver_device(device)
        if self.sums.is_meta:
            self.sums = torch.zeros_like(self.sums, device=device)
        else:
            self.sums = self.sums.to(device)

    def add(self, number: int, x: Tensor) -> None:
        """Add the rows of an input [..., in] of a matrix. A row with NaN or Inf (masked padding) does not count.

        torch.compile traces it.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.dtype is torch.float64:
            rows = rows.float()
        if self.sums.device != solver_device(x.device):
            self.to(x.device)
        is_finite = torch.isfinite(rows).all(dim=1)
        finite_rows = torch.where(is_finite.unsqueeze(1), rows, 0)
        sums = self.sums[number]
        norms = torch.linalg.vector_norm(finite_rows, dim=0, dtype=torch.float32)
        sums[:-2] += norms.to(sums.device).double().square()
        sums[-2] += is_finite.sum().to(sums.device)
        sums[-1] += len(rows)


def wait_for_inputs(layer: Any, dense_weight: Tensor) -> InputStatistics:
    """The statistics with which a `LoRALayer`, which has this float weight, waits for inputs."""
    previous: InputStatistics | None = layer.input_statistics
    statistics = InputStatistics(dense_weight, layer.matrix_count, dense_weight.shape[-1], layer.packed.device)
    statistics.join(layer)
    if previous is not None:  # the copies keep the weight that this layer had
        previous.calibration.add(statistics, layer.full_name)
        stop_waiting(layer)
    return statistics


def stop_waiting(layer: PackedLayer) -> None:
    """Let a layer wait for no inputs any more: its adapter has its values."""
    # Absent, and not None: torch.compile guards on it.
    statistics: InputStatistics | None = vars(layer).pop("input_statistics", None)
    if statistics is not None:
        statistics.leave(layer)
