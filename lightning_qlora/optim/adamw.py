"""PagedAdamW: torch's AdamW that pages its own state, in any training loop."""

from typing import Any

import torch

from lightning_qlora.optim.pager import Pager


class PagedAdamW(torch.optim.AdamW):
    """torch's AdamW with paged 32-bit state; the defaults are the QLoRA paper's (appendix B.2).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; the paper keeps it constant: 2e-4 up to 13B parameters, 1e-4 above.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay; 0 as in the paper's code, where torch's AdamW has 0.01.
        **kwargs: Other arguments of `torch.optim.AdamW`: foreach, fused, amsgrad, ...

    Example:
        ```python
        import torch
        from lightning_qlora import PagedAdamW
        from torch import nn

        model = nn.Linear(64, 64)
        optimizer = PagedAdamW(model.parameters(), lr=2e-4)
        model(torch.randn(8, 64)).sum().backward()
        optimizer.step()
        ```
    """

    def __init__(
        self,
        params: Any,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **kwargs)
        Pager().attach(self)
