"""PagedAdamW8bit: AdamW with state in 8 bits, which pages it, in any training loop."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qlora.checks import check_bool, check_number
from lightning_qlora.kernels import ops
from lightning_qlora.kernels.adamw import AdamWStep, Moment
from lightning_qlora.optim.optimizer_pages import windows
from lightning_qlora.optim.pager import MIN_NUMEL, Pager
from lightning_qlora.optim.saved_state import saved_parameters, split_like
from lightning_qlora.optim.state_8bit import (
    MOMENTS,
    block_count,
    is_8bit,
    quantize_like,
    shard_count,
    split_scales,
    to_32bit,
    zero_absmax,
)
from lightning_qlora.tensors.dtensor import is_sharded, local

WINDOW_NUMEL = 16 * 2**20  # elements whose state is prefetched together: 32 MiB in 8 bits
adamw_step = partial(ops.write_in_place, "adamw_step")
adamw8bit_step = partial(ops.write_in_place, "adamw8bit_step")


class PagedAdamW8bit(Optimizer):
    """AdamW with paged, blockwise 8-bit state: a quarter of AdamW's bytes, with bitsandbytes' levels and blocks.

        m_hat = m / (1 - beta1^t)                   v_hat = v / (1 - beta2^t)
        p = p (1 - lr wd) - lr * m_hat / (max(sqrt(v_hat), |m_hat|) + eps)

    AdamW has no |m_hat| in the denominator. Here it keeps every step within one learning rate: a v below 1.6e-7 of the
    largest in its block of 256 gets the code of 0, and m does not (`kernels/adamw.py`; Dettmers et al. 2022,
    "8-bit optimizers via block-wise quantization").

    Tensors of fewer than 4096 elements have 32-bit state, and so have those that are split by columns (tensor
    parallelism), or twice (with FSDP2). A state dict has for each parameter `step` and either
    `exp_avg`, `exp_avg_sq` in fp32, or uint8 codes and fp32 scales: `exp_avg_codes`, `exp_avg_absmax`,
    `exp_avg_sq_codes`, `exp_avg_sq_absmax`. It loads bit for bit with and without paging, on the CPU and on a GPU.
    State of `torch.optim.AdamW` also loads, and stays in 32 bits. A paged 32-bit optimizer (`PagedAdamW`, or any
    optimizer with the plugin) decodes 8-bit state when it loads it.

    Args:
        params: Parameters or parameter groups; fp32, bf16 or fp16.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay; 0 as in the paper's code, where torch's AdamW has 0.01.
        paged: Page the state to host memory when it is on a GPU.

    Raises:
        TypeError: If an argument, or a value in a parameter group, is not a number (betas: a pair; paged: a bool).
        ValueError: If a number is out of its range, betas are not two, or there are no parameters.

    Example:
        ```python
        import torch
        from lightning_qlora import PagedAdamW8bit
        from torch import nn

        model = nn.Linear(64, 64)
        optimizer = PagedAdamW8bit(model.parameters(), lr=2e-4)
        model(torch.randn(8, 64)).sum().backward()
        optimizer.step()
        print(optimizer.state[model.weight].keys())
        ```
    """

    steps_in_windows = True  # calls `optimizer_pages.windows`
    steps_by_learning_rate = True  # as Adam
    splits_state = True  # `load_state_dict` takes whole state of a sharded parameter

    def __init__(
        self,
        params: Any,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        paged: bool = True,
    ) -> None:
        check_bool("paged", paged)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        if paged:
            Pager().attach(self)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_numbers(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once; `closure` computes the loss and the gradients and is called first.

        Raises TypeError if a parameter is not fp32, bf16 or fp16, or a gradient is sparse.
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

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; every tensor keeps its type.

        torch would cast all state of a floating-point parameter to its type: codes to floats, scales to bf16. Whole
        state is split as the parameters are, and quantized again if it was saved in another number of shards.
        Raises ValueError for parts of state (DTensors) that were saved in another number of shards.
        """
        super().load_state_dict({**state_dict, "state": {}})
        for index, param, betas in saved_parameters(self, state_dict):
            state = state_dict["state"].get(index, {})
            if not shard_count(param):
                state = to_32bit(state, betas)
            saved_shards = int(state.get("shards", 1))
            if is_8bit(state) and saved_shards != shard_count(param):
                if is_sharded(state[f"{MOMENTS[0]}_codes"]):
                    raise ValueError(
                        f"8-bit optimizer state was saved in {saved_shards} shards, and the parameter has "
                        f"{shard_count(param)}: each shard has blocks of its own. Save it in one file: "
                        "ModelParallelStrategy(save_distributed_checkpoint=False)."
                    )
                state = quantize_like(_new_state(param), state, param)
            for key, value in split_scales(param, split_like(param, state)).items():
                if not isinstance(value, Tensor):
                    value = torch.tensor(value, device="cpu")
                device = param.device
                if key == "step":
                    device = torch.device("cpu")
                self.state[param][key] = value.detach().to(device, copy=True)

    def _update(self, params: list[Any], group: dict[str, Any]) -> None:
        states: list[Any] = []
        for param in params:
            if param.grad.layout != torch.strided:
                raise TypeError(
                    "PagedAdamW8bit got a sparse gradient: use torch.optim.SparseAdam for that parameter, or make its "
                    "embedding with sparse=False."
                )
            state = self.state[param]
            if not state:
                state.update(_new_state(param))
            states.append(state)
            moment = state[f"{MOMENTS[0]}_codes" if is_8bit(state) else MOMENTS[0]]
            if local(moment).numel() != local(param).numel():  # a kernel would write beyond the state
                raise ValueError(
                    f"PagedAdamW8bit: a parameter of shape {list(param.shape)} has state of shape "
                    f"{list(moment.shape)}: it changed since the last step, as by load_adapter with another rank. Make "
                    "the optimizer again."
                )
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        groups: dict[tuple[Any, ...], list[tuple[Tensor, Any]]] = defaultdict(list)  # one kernel launch each
        for param, state, step in zip(params, states, map(int, steps), strict=True):
            # The last ranks may have no rows of a small sharded parameter.
            if local(param).numel():
                groups[step, is_8bit(state), param.device, param.dtype, param.grad.dtype].append((param, state))
        beta1, beta2 = group["betas"]
        numbers = [group["lr"], beta1, beta2, group["eps"], group["weight_decay"]]
        for (step, in_8bit, *_), members in groups.items():
            scalars = AdamWStep(step, *map(float, numbers))  # they may be tensors
            params = [local(param) for param, _ in members]
            grads = [local(param.grad) for param, _ in members]
            states = [state for _, state in members]
            if in_8bit:
                adamw8bit_step(params, grads, *(_local_8bit(states, moment) for moment in MOMENTS), scalars)
            else:
                adamw_step(params, grads, *(_local(states, moment) for moment in MOMENTS), scalars)


def _local(states: list[Any], key: str) -> list[Tensor]:
    return [local(state[key]) for state in states]


def _local_8bit(states: list[Any], moment: str) -> Moment:
    """Local codes and scales; a DTensor has as many scales on all ranks as the largest shard has blocks."""
    codes = _local(states, f"{moment}_codes")
    scales = _local(states, f"{moment}_absmax")
    counts = [block_count(part.numel()) for part in codes]
    # To cut where nothing is left out would take as long as all else of a parameter.
    return codes, [each if each.numel() == n else each[:n] for each, n in zip(scales, counts, strict=True)]


def _check_numbers(numbers: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        check_number(name, _plain(numbers[name]), at_least=0)
    betas = numbers["betas"]
    if not isinstance(betas, list | tuple):
        raise TypeError(f"betas={betas!r}: must be two numbers, such as (0.9, 0.999).")
    if len(betas) != 2:
        raise ValueError(f"betas={betas!r}: must be two numbers, such as (0.9, 0.999), not {len(betas)}.")
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", _plain(beta), at_least=0, below=1)


def _plain(value: Any) -> Any:
    """Numbers of a parameter group may be one-element tensors, as torch's."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value


def _new_state(param: Tensor) -> dict[str, Tensor]:
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"PagedAdamW8bit got a parameter of {param.dtype}: it trains fp32, bf16 and fp16 parameters.")
    state = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    if param.numel() < MIN_NUMEL or not shard_count(param):
        return {**state, **{moment: torch.zeros_like(param, dtype=torch.float32) for moment in MOMENTS}}
    if is_sharded(param):  # also in one shard: distributed checkpoints load what the new state has
        state["shards"] = torch.tensor(shard_count(param), device="cpu")
    for moment in MOMENTS:
        state[f"{moment}_codes"] = torch.zeros_like(param, dtype=torch.uint8)
        state[f"{moment}_absmax"] = zero_absmax(param)
    return state
