"""The statistic of calibration: the root mean square (RMS) of every input channel of a layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_qlora.layers.dtensor import of_all_ranks, world_size
from lightning_qlora.layers.qlora_linear import QLoRALinear


class InputStatistics:
    """For every layer, the sum of squares of each input channel, over all rows of all calls on all ranks.

    A row with NaN or Inf (padding that a model masks, for example) is not counted.

    Attributes:
        sums: Name -> fp64 [in + 2]: the sum of squares of each channel, the number of counted rows, and of all rows.
    """

    def __init__(self, layers: Mapping[str, QLoRALinear]) -> None:
        self._layers = layers
        self.sums = {
            name: torch.zeros(layer.in_features + 2, dtype=torch.float64, device=layer.packed.device)
            for name, layer in layers.items()
        }

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Within this, every input of a layer is counted."""
        hooks = [
            layer.register_forward_pre_hook(partial(self._count, self.sums[name]), with_kwargs=True)
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _count(total: Tensor, _: QLoRALinear, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        x = (*args, *kwargs.values())[0].detach()
        if not x.is_floating_point():
            return  # the layer refuses it
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32 if x.dtype is torch.float64 else None)
        total[-1] += len(rows)
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).double().square()
        if not torch.isfinite(squares).all():
            rows = rows[torch.isfinite(rows).all(dim=1)]
            squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).double().square()
        total[:-2] += squares
        total[-2] += len(rows)

    def sum_over_ranks(self) -> None:
        """Add the sums of all ranks, in one message; RuntimeError if they collected from different layers."""
        if world_size() == 1:
            return
        names_of_ranks = of_all_ranks(list(self.sums))
        every = {name for names in names_of_ranks for name in names}
        differing = sorted(name for name in every if any(name not in names for names in names_of_ranks))
        if differing:
            raise RuntimeError(
                f"init_lora_weights='calibrated': not all ranks run {differing[0]} ({len(differing)} layers differ) in "
                "their first forward pass, so its inputs can't be summed over the ranks. Use the Trainer, which "
                "calibrates on whole training steps, or init_lora_weights='loftq', which needs no data."
            )
        device = next(iter(self.sums.values())).device
        flat = torch.cat([total.to(device) for total in self.sums.values()])
        dist.all_reduce(flat)
        for total in self.sums.values():
            total.copy_(flat[: len(total)])
            flat = flat[len(total) :]

    def rows(self, name: str) -> int:
        """Number of counted rows of a layer."""
        return int(self.sums[name][-2])

    def rms(self, name: str) -> Tensor:
        """RMS of every input channel, fp32 [in]; zeros without an input, ValueError if every row has NaN or Inf."""
        total = self.sums[name]
        result = (total[:-2] / total[-2].clamp_min(1)).sqrt().float()
        if (total[-1] and not total[-2]) or not torch.isfinite(result).all():
            raise ValueError(
                f"{name}: NaN or Inf in all its inputs in the batches that init_lora_weights='calibrated' uses, so "
                "training would fail too. Check the data and compute_dtype (fp16 overflows)."
            )
        return result
