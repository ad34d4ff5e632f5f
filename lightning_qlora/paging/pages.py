"""OptimizerPages: when the state of one optimizer moves.

    forward, backward                        state rests on the host (or is evicted there when memory is short)
    step: closure (forward, backward), then  to_device: everything this optimizer has paged
          update                             new state is paged as it is made
    after the step                           to_host

Everything hangs on the public hooks of `torch.optim.Optimizer`. The step pre-hook fires before a closure has run
backward, so it hands the optimizer a closure that fetches the state when the gradients are there.
"""

import weakref
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_qlora.paging.choice import open_pool
from lightning_qlora.paging.moments import in_32bit
from lightning_qlora.paging.pool import Pool
from lightning_qlora.paging.state import PagedState, tensors_in


class OptimizerPages:
    """Pages the state of one optimizer from construction to `close`.

    Args:
        optimizer: Any `torch.optim.Optimizer`. State it already has is paged at once.
        min_numel: Tensors with fewer elements stay where they are.
    """

    def __init__(self, optimizer: Optimizer, min_numel: int) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._min_numel = min_numel
        self._pools: dict[torch.device, Pool | None] = {}
        self._in_step = False
        self._held_back: list[tuple[Tensor, str, Tensor]] = []
        optimizer.state = PagedState(self, optimizer.state)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(_to_plain_dicts),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    @property
    def pools(self) -> list[Pool]:
        """The pools in use, one a device."""
        return [pool for pool in self._pools.values() if pool is not None]

    def page(self, param: Any, value: Any) -> None:
        """Page every tensor in `value`, in place: dense ones on a GPU, of the size threshold or more.

        A view of the parameter, of its gradient or of a larger tensor stays where it is.
        """
        for tensor in tensors_in(value):
            pool = self._pool(tensor.device) if self._can_page(param, tensor) else None
            if pool is not None and not pool.owns(tensor):
                pool.adopt(tensor)
                if not self._in_step:
                    pool.to_host([tensor])
                    pool.finish()

    def paged(self, params: list[Tensor] | None = None) -> Iterator[tuple[Pool, list[Tensor]]]:
        """Each pool with the tensors it owns, of all parameters or of some."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        states = optimizer.state.values() if params is None else [optimizer.state.get(param) for param in params]
        tensors = [tensor for tensor in tensors_in(list(states)) if tensor.numel() >= self._min_numel]
        for pool in self.pools:
            yield pool, [tensor for tensor in tensors if pool.owns(tensor)]

    def to_device(self, params: list[Tensor] | None = None) -> None:
        """Start moving paged state to the device."""
        for pool, tensors in self.paged(params):
            pool.to_device(tensors)

    def arrive(self) -> None:
        """Let kernels wait for what is on its way to the device."""
        for pool in self.pools:
            pool.arrive()

    def to_host(self, params: list[Tensor] | None = None) -> None:
        """Start giving device memory back."""
        for pool, tensors in self.paged(params):
            pool.to_host(tensors)

    def close(self) -> None:
        """Stop paging: the state moves to plain host memory, every page is freed, every hook is removed."""
        optimizer = self._optimizer()
        if optimizer is not None and isinstance(optimizer.state, PagedState):
            for pool, tensors in self.paged():
                for tensor in tensors:
                    pool.release(tensor)
            optimizer.state = optimizer.state.plain()
        for hook in self._hooks:
            hook.remove()
        self._pools.clear()

    def _pool(self, device: torch.device) -> Pool | None:
        if device not in self._pools:
            self._pools[device] = open_pool(device)
        return self._pools[device]

    def _can_page(self, param: Any, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or tensor.numel() < max(self._min_numel, 1):
            return False
        memory = tensor.untyped_storage()
        others = [t.data for t in (param, getattr(param, "grad", None)) if isinstance(t, Tensor)]
        used = {other.untyped_storage().data_ptr() for other in tensors_in(others)}
        return memory.nbytes() == tensor.numel() * tensor.element_size() and memory.data_ptr() not in used

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._in_step = True
        if not isinstance(optimizer.state, PagedState):  # an optimizer with its own load_state_dict has made a new one
            optimizer.state = PagedState(self, optimizer.state)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._fetch(optimizer)
            return None

        def fetching_closure() -> Any:
            loss = closure()
            self._fetch(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], fetching_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": fetching_closure}

    def _fetch(self, optimizer: Optimizer) -> None:
        if not walks_in_windows(optimizer):
            self.to_device()
            self.arrive()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for param, state in optimizer.state.items():
            for value in state.values() if isinstance(state, dict) else [state]:
                if not isinstance(value, Tensor):  # a list may have grown since it was put in
                    self.page(param, value)
        self.to_host()
        for pool in self.pools:
            pool.finish()
        self._in_step = False

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Hold large tensors back from torch, which would put all of them on the device at once.

        8-bit moments are decoded: no optimizer but PagedAdamW8bit can read them, and that one loads its state itself.
        """
        own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = dict(zip(saved, own, strict=False))  # torch checks the lengths, with a better message
        kept: dict[Any, Any] = {}
        self._held_back = []
        for index, values in state_dict["state"].items():
            if index not in params or not isinstance(values, dict):
                kept[index] = values
                continue
            values = in_32bit(values)
            held = [key for key, value in values.items() if self._holds_back(params[index], key, value)]
            self._held_back += [(params[index], key, values[key]) for key in held]
            kept[index] = {key: value for key, value in values.items() if key not in held}
        return {**state_dict, "state": kept}

    def _holds_back(self, param: Tensor, key: Any, value: Any) -> bool:
        large = type(value) is Tensor and value.layout == torch.strided and value.numel() >= max(self._min_numel, 1)
        return key != "step" and large and self._pool(param.device) is not None

    def _after_load(self, optimizer: Optimizer) -> None:
        optimizer.state = PagedState(self, optimizer.state)
        for param, key, value in self._held_back:
            pool = self._pool(param.device)
            # torch's rule: state of a floating parameter takes its type (Optimizer.load_state_dict)
            dtype = param.dtype if param.is_floating_point() else value.dtype
            if pool is not None:
                optimizer.state[param][key] = pool.place(value, dtype)
        self._held_back = []


def pages_of(optimizer: Optimizer) -> OptimizerPages | None:
    """The pages an optimizer has already."""
    pages = getattr(optimizer.state, "pages", None)
    return pages if isinstance(pages, OptimizerPages) else None


def walks_in_windows(optimizer: Optimizer) -> bool:
    """Whether the optimizer's own `step` fetches its state, a window of parameters at a time (see `windows`)."""
    return getattr(optimizer, "walks_in_windows", False) is True


def _to_plain_dicts(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint knows nothing of paging."""
    state = {k: dict(value) if isinstance(value, dict) else value for k, value in state_dict["state"].items()}
    return {**state_dict, "state": state}
