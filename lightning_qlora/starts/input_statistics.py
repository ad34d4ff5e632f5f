"""InputStatistics: what an adapter that is initialized from data ("calibrated") needs until then.

The layer and its copies share one: a copy is the same layer, so it begins with the same values, which
`calibration/calibration.py` computes.
"""

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_qlora.kernels.ops import TAGS

# Places of numbers of rows in the sums:
FINITE_ROWS = -3
TRAINING_ROWS = -2
ROWS_BEFORE_STEP = -1  # those of forward passes with gradients, in which B was 0
WITHOUT_SOLVERS = ("mps",)  # types of devices


class InputStatistics:
    """The float weight of a layer, and sums over its inputs.

    Attributes:
        dense_weight: [out, in], of a stack [experts, out, in], in host memory; on the meta device: another rank has it.
        sums: fp64 [matrices, in + 3]: of each matrix the squares of each input, and three numbers of rows.
        report: The `Calibration` of the conversion that made the layer, which the plugin calls in the first step.
    """

    def __init__(self, dense_weight: Tensor, matrices: int, inputs: int, device: torch.device) -> None:
        self.dense_weight = dense_weight
        self.sums = torch.zeros(matrices, inputs + 3, dtype=torch.float64, device=solver_device(device))
        self.report: Any = None
        self._layers: list[ref[nn.Module]] = []  # in the order in which they were made, the same on all ranks

    def __deepcopy__(self, memo: Any) -> "InputStatistics":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_layers": []}

    @property
    def layers(self) -> list[Any]:
        layers = [each() for each in self._layers]
        return [layer for layer in layers if layer is not None]

    @property
    def name(self) -> str:
        name: str = self.layers[0].full_name
        return name

    def join(self, layer: nn.Module) -> None:
        self._layers.append(ref(layer))

    def leave(self, layer: Any) -> None:
        self._layers = [each for each in self._layers if each() not in (layer, None)]
        if not self._layers and self.report is not None:
            self.report.waiting.remove(layer.full_name)

    def leave_to_another_rank(self) -> None:
        """Free the weight: another rank has it, and computes the values of the adapter."""
        self.dense_weight = self.dense_weight.to("meta")

    def refuse_split(self) -> None:
        raise ValueError(
            f"{self.name}: init_lora_weights='calibrated' is computed in the first step, from whole layers, and this "
            "layer is split over ranks before it. Use 'default' or 'gaussian' with tensor parallelism."
        )

    @property
    def has_weight(self) -> bool:
        return not self.dense_weight.is_meta

    def to(self, device: torch.device) -> None:
        """Move the sums with a layer, whose weight may have been read after it was on the meta device."""
        device = solver_device(device)
        if self.sums.is_meta:
            self.sums = torch.zeros_like(self.sums, device=device)
        else:
            self.sums = self.sums.to(device)

    def add(self, layer: Any, number: int, x: Tensor, lora_b: Tensor) -> None:
        """Add an input [..., in] of a matrix of a layer, which has this B, in a forward pass with gradients."""
        if not torch.is_grad_enabled() or not x.is_floating_point():
            return
        if self.sums.device != solver_device(x.device):
            self.to(x.device)
        add_input(self.sums, number, x.detach(), lora_b.detach(), layer.training, layer.full_name)


# An op, since torch.compile can't trace a decision by values, and outside of CUDA graphs, which can't make one.
@torch.library.custom_op("lightning_qlora::add_input", mutates_args=("sums",), tags=TAGS)
def add_input(sums: Tensor, number: int, x: Tensor, lora_b: Tensor, in_training: bool, name: str) -> None:
    """Add the rows of an input to the sums of a matrix. A row with NaN or Inf (masked padding) does not count.

    Raises:
        RuntimeError: If an optimizer changed B, which was 0 in another forward pass.
    """
    sums = sums[number]
    rows = x.reshape(-1, x.shape[-1])
    if not lora_b.any():
        sums[ROWS_BEFORE_STEP] += len(rows)
    elif sums[ROWS_BEFORE_STEP]:
        raise RuntimeError(
            f"init_lora_weights='calibrated': an optimizer changed the adapter of {name} before it was initialized "
            "from its inputs. In a loop of your own call lightning_qlora.calibrate(module) between the first backward "
            "pass and the first step (replicas=torch.distributed.group.WORLD if several ranks train the same layers)."
        )
    if not in_training:
        return
    if rows.dtype is torch.float64:
        rows = rows.float()
    is_finite = torch.isfinite(rows).all(dim=1)
    finite_rows = torch.where(is_finite.unsqueeze(1), rows, 0)
    norms = torch.linalg.vector_norm(finite_rows, dim=0, dtype=torch.float32)
    sums[:FINITE_ROWS] += norms.to(sums.device).double().square()
    sums[FINITE_ROWS] += is_finite.sum().to(sums.device)
    sums[TRAINING_ROWS] += len(rows)


@add_input.register_fake
def _(sums: Tensor, number: int, x: Tensor, lora_b: Tensor, in_training: bool, name: str) -> None:
    pass


def solver_device(device: torch.device) -> torch.device:
    """Where to compute in fp64, and eigenvalues: the CPU for a device that has none of them (Apple's MPS)."""
    if device.type in WITHOUT_SOLVERS:
        return torch.device("cpu")
    return device
