"""PagedAdamW and PagedAdamW8bit: AdamW whose state pages by itself, in any loop. Usable by name from YAML."""

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_qlora.kernels.adamw import STATE_BLOCK_SIZE, AdamWStep
from lightning_qlora.kernels.ops import adamw8bit_step, adamw_step
from lightning_qlora.paging.moments import MOMENTS, codes_of, in_8bit, scales_of, with_codes_named
from lightning_qlora.paging.pager import MIN_NUMEL, Pager
from lightning_qlora.paging.sharded import local, shards, zero_scales
from lightning_qlora.paging.windows import windows

WINDOW_NUMEL = 16 * 2**20  # elements whose state is fetched together: 32 MiB in 8 bits


class PagedAdamW(torch.optim.AdamW):
    """torch's AdamW with paged 32-bit state and the QLoRA paper's recipe as defaults (appendix B.2).

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate; the paper keeps it constant: 2e-4 up to 13B parameters, 1e-4 above.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        **kwargs: What else `torch.optim.AdamW` takes: foreach, fused, amsgrad, ...
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
        self._pager = Pager()
        self._pager.attach(self)


class PagedAdamW8bit(Optimizer):
    """AdamW with paged blockwise 8-bit state: a quarter of the bytes, bitsandbytes' numbers.

    The formula is in kernels/adamw.py. Tensors of fewer than 4096 elements keep 32-bit state. A state dict holds, for
    each parameter, `step` and either `exp_avg`, `exp_avg_sq` in fp32, or for both uint8 codes and scales:
    `exp_avg_codes`, `exp_avg_absmax`, `exp_avg_sq_codes`, `exp_avg_sq_absmax`; it loads paged and unpaged, on the CPU
    and on a GPU, bit for bit. The state of `torch.optim.AdamW` loads too, and stays in 32 bits. The other way, an
    optimizer that is paged (`PagedAdamW`, or any under the plugin) decodes 8-bit state to 32 bits.

    Args:
        params: Parameters or parameter groups; fp32, bf16 or fp16.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        paged: Page the state to host memory when it is on a GPU.

    Raises:
        TypeError: If one of them, or of a parameter group's own, is no number (betas: no pair).
        ValueError: If a number is out of its range, or betas are not two.
    """

    walks_in_windows = True

    def __init__(
        self,
        params: Any,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        paged: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        _check_numbers(defaults)
        super().__init__(params, defaults)
        self._pager = Pager()
        if paged:
            self._pager.attach(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `Optimizer.add_param_group`; the group's own numbers are checked as the constructor's are."""
        _check_numbers(param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` recomputes the loss and is run first, with gradients enabled.

        Raises:
            TypeError: If a parameter is not fp32, bf16 or fp16, or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for window in windows(self, params, WINDOW_NUMEL):
                self._update(window, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`, but every tensor keeps its type.

        torch would cast all state of a floating parameter to the parameter's type: codes to floats, scales to bf16.

        Raises:
            ValueError: If 8-bit state was saved on another number of FSDP ranks.
        """
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, own, strict=True):
            state = with_codes_named(state_dict["state"].get(index, {}))
            saved_shards = int(state.get("shards", 1))
            if in_8bit(state) and saved_shards != shards(param):
                raise ValueError(
                    f"8-bit optimizer state was saved in {saved_shards} shards and the parameter has {shards(param)}: "
                    "its blocks belong to shards. Resume on as many ranks, or with PagedAdamW, which decodes them."
                )
            for key, value in state.items():
                device = "cpu" if key == "step" else param.device
                self.state[param][key] = torch.as_tensor(value).detach().to(device, copy=True)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for param in params:
            if param.grad is not None and param.grad.layout != torch.strided:
                raise TypeError(
                    "PagedAdamW8bit got a sparse gradient: use torch.optim.SparseAdam for that parameter, or make its "
                    "embedding with sparse=False."
                )
            if not self.state[param]:
                self.state[param].update(_new_state(param))
        alike: dict[tuple[int, bool], list[Tensor]] = defaultdict(list)  # of one step count and one kind of state
        for param in params:
            state = self.state[param]
            state["step"] += 1
            if local(param).numel():  # the last ranks may hold nothing of a small sharded parameter
                alike[int(state["step"]), in_8bit(state)].append(param)
        beta1, beta2 = group["betas"]
        for (step, has_codes), members in alike.items():
            scalars = AdamWStep(step, float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"])
            params = [local(param) for param in members]
            grads = [local(param.grad) for param in members if param.grad is not None]
            keys = [codes_of(moment) if has_codes else moment for moment in MOMENTS]
            m, v = ([local(self.state[param][key]) for param in members] for key in keys)
            if has_codes:
                m_scales, v_scales = (
                    [local(self.state[param][scales_of(moment)])[: blocks(local(param))] for param in members]
                    for moment in MOMENTS
                )
                adamw8bit_step(params, grads, m, m_scales, v, v_scales, scalars)
            else:
                adamw_step(params, grads, m, v, scalars)


def blocks(param: Tensor) -> int:
    """Blocks of 8-bit state a parameter has."""
    return -(-param.numel() // STATE_BLOCK_SIZE)


def _check_numbers(numbers: dict[str, Any]) -> None:
    """Refuse numbers of the constructor, or of a parameter group that has its own, which AdamW can't compute with."""
    for name in ("lr", "eps", "weight_decay"):
        value = numbers.get(name, 0.0)
        if not _is_number(value):
            raise TypeError(f"{name}={value!r}: must be a number, 0 or more.")
        if not value >= 0:
            raise ValueError(f"{name}={value!r}: must be 0 or more.")
    betas = numbers.get("betas", (0.0, 0.0))
    if not isinstance(betas, list | tuple) or not all(_is_number(beta) for beta in betas):
        raise TypeError(f"betas={betas!r}: must be two numbers, such as (0.9, 0.999).")
    if len(betas) != 2:
        raise ValueError(f"betas={betas!r}: must be two numbers, such as (0.9, 0.999), not {len(betas)}.")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas!r}: each must be from 0 up to, not including, 1.")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):  # as torch's optimizers take them
        return value.numel() == 1
    return isinstance(value, Real) and not isinstance(value, bool)


def _new_state(param: Tensor) -> dict[str, Tensor]:
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"PagedAdamW8bit got a parameter of {param.dtype}: it trains fp32, bf16 and fp16 parameters.")
    state = {"step": torch.zeros((), dtype=torch.float32)}
    if param.numel() < MIN_NUMEL:
        return {**state, **{moment: torch.zeros_like(param, dtype=torch.float32) for moment in MOMENTS}}
    if shards(param) > 1:
        state["shards"] = torch.tensor(shards(param))
    for moment in MOMENTS:
        state[codes_of(moment)] = torch.zeros_like(param, dtype=torch.uint8)
        state[scales_of(moment)] = zero_scales(param, STATE_BLOCK_SIZE)
    return state
