"""The statistic of a calibrated start: how large each layer's input channels are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_qlora.linear import QLoRALinear
from lightning_qlora.random_state import world_size


class InputSizes:
    """Sums, for every layer, the squares of its input's channels, over all rows of all its calls, on all ranks.

    Attributes:
        sums: Name -> fp64 [in + 1]: the sum of squares of each channel, and the number of rows.
    """

    def __init__(self, layers: Mapping[str, QLoRALinear]) -> None:
        self._layers = layers
        self.sums = {
            name: torch.zeros(layer.in_features + 1, dtype=torch.float64, device=layer.packed.device)
            for name, layer in layers.items()
        }

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Count every input that reaches a layer while this lasts."""
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
        rows = x.reshape(-1, x.shape[-1])
        total[:-1] += torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).double().square()
        total[-1] += len(rows)

    def sum_over_ranks(self) -> None:
        """Add the other ranks' sums, in one message."""
        if world_size() > 1:
            device = next(iter(self.sums.values())).device
            flat = torch.cat([total.to(device) for total in self.sums.values()])
            dist.all_reduce(flat)
            for total in self.sums.values():
                total.copy_(flat[: len(total)])
                flat = flat[len(total) :]

    def rows(self, name: str) -> int:
        """How many rows a layer saw."""
        return int(self.sums[name][-1])

    def rms(self, name: str) -> Tensor:
        """Root mean square of every input channel, fp32 [in]; zero for a layer that saw no input.

        Raises:
            ValueError: If an input was NaN or infinite.
        """
        total = self.sums[name]
        result = (total[:-1] / total[-1].clamp_min(1)).sqrt().float()
        if not torch.isfinite(result).all():
            raise ValueError(
                f"{name}: NaN or Inf among its inputs in the batches that init_lora_weights='calibrated' looks at, so "
                "the model would not train from them either. Look at the data and at compute_dtype (fp16 overflows)."
            )
        return result
