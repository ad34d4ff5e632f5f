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

    A row with NaN or Inf in it (padding that a model masks, say) does not count.

    Attributes:
        sums: Name -> fp64 [in + 2]: the sum of squares of each channel, the rows that count, and all rows.
    """

    def __init__(self, layers: Mapping[str, QLoRALinear]) -> None:
        self._layers = layers
        self.sums = {
            name: torch.zeros(layer.in_features + 2, dtype=torch.float64, device=layer.packed.device)
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
        total[-1] += len(rows)
        squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).double().square()
        if not torch.isfinite(squares).all():
            rows = rows[torch.isfinite(rows).all(dim=1)]
            squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).double().square()
        total[:-2] += squares
        total[-2] += len(rows)

    def sum_over_ranks(self) -> None:
        """Add the other ranks' sums, in one message.

        Raises:
            RuntimeError: If the ranks look at different layers, whose sums must not be mixed.
        """
        if world_size() == 1:
            return
        everyone: list[list[str]] = [[] for _ in range(world_size())]
        dist.all_gather_object(everyone, list(self.sums))
        odd = sorted({name for names in everyone for name in names if any(name not in other for other in everyone)})
        if odd:
            raise RuntimeError(
                f"init_lora_weights='calibrated': not all ranks run {odd[0]} ({len(odd)} layers differ) in their first "
                "forward pass, so they can't start it together. Use the Trainer with automatic optimization, which "
                "looks at whole training steps, or init_lora_weights='loftq', which needs no data."
            )
        device = next(iter(self.sums.values())).device
        flat = torch.cat([total.to(device) for total in self.sums.values()])
        dist.all_reduce(flat)
        for total in self.sums.values():
            total.copy_(flat[: len(total)])
            flat = flat[len(total) :]

    def rows(self, name: str) -> int:
        """How many rows of a layer count."""
        return int(self.sums[name][-2])

    def rms(self, name: str) -> Tensor:
        """Root mean square of every input channel, fp32 [in]; zero for a layer that saw no input.

        Raises:
            ValueError: If rows came and every one had NaN or Inf in it.
        """
        total = self.sums[name]
        result = (total[:-2] / total[-2].clamp_min(1)).sqrt().float()
        if (total[-1] and not total[-2]) or not torch.isfinite(result).all():
            raise ValueError(
                f"{name}: NaN or Inf in all its inputs in the batches that init_lora_weights='calibrated' looks at, so "
                "the model would not train from them either. Look at the data and at compute_dtype (fp16 overflows)."
            )
        return result
