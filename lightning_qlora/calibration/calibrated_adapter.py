"""The values of adapters that are initialized from inputs, and the ranks that compute them; see `calibration.py`."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.starts.calibrated import calibrated_adapter, calibrated_error
from lightning_qlora.starts.input_statistics import FINITE_ROWS, TRAINING_ROWS, InputStatistics
from lightning_qlora.tensors.dtensor import gather, of_all_ranks, world_size


def adapter_of(
    layer: LoRALayer, dense_weight: Tensor, input_rms: Tensor, rank: int, group: Any
) -> tuple[Tensor, Tensor, list[float | None]]:
    """A and B of a layer from the RMS of its inputs [matrices, in]: computed on one rank, then broadcast.

    And `calibrated_error` of each matrix; None, and the present A and B, if there is nothing to compute.
    """
    errors: list[float | None] = [None] * len(input_rms)
    lora_a, lora_b = (list(layer.split_matrices(gather(p))) for p in (layer.lora_A, layer.lora_B))
    bases = layer.whole_bytes.unbind()  # of a sharded layer all ranks gather the base
    device = layer.packed.device
    for number, weight in enumerate(layer.split_matrices(dense_weight)):
        if not input_rms[number].any():
            continue
        shapes = lora_a[number].shape, lora_b[number].shape, ()
        values = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
        if group is None or dist.get_rank(group) == rank:
            with torch.autocast(device.type, enabled=False):
                operands = weight.to(device, layer.weight_dtype), bases[number], input_rms[number].to(device)
                adapter = calibrated_adapter(*operands, layer.config, layer.seed_name_of(number))
                error = calibrated_error(*operands, *adapter, layer.scaling)
            values = [part.contiguous() for part in (*adapter, error)]
        if group is not None:
            for value in values:
                dist.broadcast(value, dist.get_global_rank(group, rank), group)
        lora_a[number], lora_b[number], error = values
        errors[number] = float(error)
    return layer.join_matrices(lora_a), layer.join_matrices(lora_b), errors


def root_mean_square(name: str, sums: Tensor) -> Tensor:
    """RMS of every input, fp32 [matrices, in]; zeros without an input, ValueError if every row has NaN or Inf."""
    squares = sums[:, :FINITE_ROWS]
    finite_rows = sums[:, FINITE_ROWS]
    result = (squares / finite_rows.clamp_min(1).unsqueeze(1)).sqrt().float()
    no_finite_row = (sums[:, TRAINING_ROWS] > 0) & (finite_rows == 0)
    if no_finite_row.any() or not torch.isfinite(result).all():
        raise ValueError(
            f"{name}: NaN or Inf in all its inputs in the batches that init_lora_weights='calibrated' uses, so "
            "training would fail too. Check the data and compute_dtype (fp16 overflows)."
        )
    return result


def keep_weights_of_this_rank(waiting: Iterable[InputStatistics]) -> None:
    """Sharded layers: each rank keeps the float weights of its share of the layers, and computes their adapters."""
    waiting = list(waiting)
    if not all(statistics.has_weight for statistics in waiting):
        return  # the ranks shared the work of loading
    for place, statistics in enumerate(waiting):
        if place % world_size() != dist.get_rank():
            statistics.leave_to_another_rank()


def ranks_with_weights(waiting: list[InputStatistics], group: Any) -> list[int]:
    """The rank in the group that computes each adapter: one that has the float weight, so that ranks share the work."""
    has_weight = [statistics.has_weight for statistics in waiting]
    of_ranks = [has_weight] if group is None else of_all_ranks(has_weight, group)
    ranks = []
    for place in range(len(waiting)):
        candidates = [rank for rank, has in enumerate(of_ranks) if has[place]] or [0]
        ranks.append(candidates[place % len(candidates)])
    return ranks
