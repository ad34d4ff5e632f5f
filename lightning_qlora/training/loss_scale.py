"""LossScale: the scale of a loss whose gradients are computed in fp16.

    the gradients of scale * loss, divided by the scale in fp32

fp16 has no number between 0 and 6e-8, and the gradients of a young adapter are smaller. Scaled ones are not. If a
gradient overflows, the step is skipped and the scale is halved; after 2000 steps without an overflow it is doubled
(Micikevicius et al. 2018, "Mixed Precision Training", section 3.2; torch/amp/grad_scaler.py).
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_qlora.layers.dtensor import by_mesh
from lightning_qlora.training.optimizers import parameters_of


class LossScale:
    """`torch.amp.GradScaler` for the optimizers of a run; as in Lightning's MixedPrecision, which has one of them.

    Two things differ from MixedPrecision. The scale is updated before the next loss and not after each step: several
    optimizers may step on gradients of one scale. And gradients are divided once, whoever asks first: clipping, in
    automatic and manual optimization, or the step.
    """

    def __init__(self, device: str) -> None:
        self._scaler = torch.amp.GradScaler(device)
        self._unscaled = set[int]()  # optimizers, by id, since the last update
        self._has_scaled = False  # since the last update
        self._has_stepped = False  # since the last update
        self._has_warned = False

    def scale(self, loss: Tensor) -> Tensor:
        """Return scale * loss."""
        self._update()
        self._has_scaled = True
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer by the scale, once for each step.

        Raises ValueError for parameters in fp16, and for some that are split over ranks beside others that are not.
        """
        params = [param for param in parameters_of(optimizer) if param.grad is not None]
        if not self._has_scaled or not params or id(optimizer) in self._unscaled:
            return
        for param in params:
            if param.dtype is torch.float16:
                raise ValueError(
                    f"A parameter of shape {list(param.shape)} trains in fp16, in which most steps are rounded to "
                    "nothing. Cast it to fp32 before the optimizer is made, or load the model in bf16."
                )
        if len(by_mesh(params)) > 1:
            raise ValueError(
                "fp16 has no loss scale for parameters that are split over ranks by a plan beside others that are not. "
                "Use compute_dtype='bf16'."
            )
        self._scaler.unscale_(optimizer)
        self._unscaled.add(id(optimizer))

    def step(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None, before_step: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Call the closure, divide the gradients, call `before_step`, and step if all gradients are finite.

        Returns what the closure returns. Raises TypeError for LBFGS.
        """
        if isinstance(optimizer, LBFGS):
            raise TypeError(
                "LBFGS computes several losses in one step, which a loss scale for fp16 does not allow: use another "
                "optimizer, or compute_dtype='bf16'."
            )
        result = None if closure is None else closure()
        self.unscale(optimizer)
        before_step()
        if id(optimizer) in self._unscaled:
            self._scaler.step(optimizer, **kwargs)
            self._has_stepped = True
        else:
            if not self._has_scaled:
                self._warn(
                    "The optimizer steps, and no loss was scaled for fp16, in which small gradients become 0. Call "
                    "self.manual_backward(loss), in Fabric fabric.backward(loss), and not loss.backward()."
                )
            optimizer.step(**kwargs)
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the number of steps since it changed."""
        self._update()
        return self._scaler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._update()
        self._scaler.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """After an update: torch pickles no scaler between a step and an update."""
        self._update()
        return vars(self)

    def _update(self) -> None:
        if not self._has_stepped:
            return
        self._scaler.update()
        self._unscaled.clear()
        self._has_scaled = False
        self._has_stepped = False
        if self._scaler.get_scale() < 1:
            self._warn(
                "Gradients in fp16 are not finite although the loss scale is below 1, so steps are skipped: the model "
                "overflows in fp16, or the data has NaN. Use compute_dtype='bf16', or 'fp32' if the card has no bf16."
            )

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, stacklevel=2)
