"""OptimizerPages: pages the state of one optimizer, and decides when it moves.

forward, backward      the state is in host memory (unified memory: where the driver has it)
optimizer.step         1. the closure, if there is one: forward, backward
                       2. prefetch the state
                       3. the update; new state is paged as soon as it is made
                       4. evict the state
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_qlora.optim.closure import before_update
from lightning_qlora.optim.host_memory import ManagedPool, PinnedPool, why_not_managed
from lightning_qlora.optim.paged_state import PagedState, tensors_in
from lightning_qlora.optim.pool import Pool
from lightning_qlora.optim.saved_state import saved_states


class OptimizerPages:
    """Pages the state of one optimizer, tensors of `min_numel` elements and more, from construction to `close`."""

    def __init__(self, optimizer: Optimizer, min_numel: int) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._min_numel = max(min_numel, 1)
        self._pools: dict[torch.device, Pool | None] = {}
        self._in_update = False
        self._large: list[tuple[Pool, Tensor, str, Tensor]] = []
        if optimizer.state:
            self._observe(optimizer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(lambda optimizer: self._synchronize()),
            optimizer.register_state_dict_post_hook(_to_plain_dicts),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    @property
    def pools(self) -> list[Pool]:
        return [pool for pool in self._pools.values() if pool is not None]

    def page(self, param: Any, value: Any) -> None:
        """Page the tensors in `value`, in place; no view of the parameter, its gradient or a larger tensor."""
        for tensor in tensors_in(value):
            if not self._can_page(param, tensor):
                continue
            pool = self._pool(tensor.device)
            if pool is not None and not pool.owns(tensor):
                pool.move_in(tensor)
                if not self._in_update:
                    pool.evict([tensor])

    def paged(self) -> Iterator[tuple[Pool, list[Tensor]]]:
        for pool in self.pools:
            yield pool, [tensor for tensor in self._tensors() if pool.owns(tensor)]

    def prefetch(self) -> None:
        for pool in self.pools:
            pool.prefetch(self._tensors())

    def wait_prefetch(self) -> None:
        for pool in self.pools:
            pool.wait_prefetch()

    def evict(self) -> None:
        for pool in self.pools:
            pool.evict(self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        """Searched for as they are asked for: in unified memory nothing is evicted."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        states = list(dict.values(optimizer.state))
        yield from (tensor for tensor in tensors_in(states) if tensor.numel() >= self._min_numel)

    def close(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            if isinstance(optimizer.state, PagedState):
                for pool, tensors in self.paged():
                    for tensor in tensors:
                        pool.move_out(tensor)
                optimizer.state = optimizer.state.plain()
            _PAGES.pop(optimizer, None)
        for hook in self._hooks:
            hook.remove()
        self._pools.clear()

    def _observe(self, optimizer: Optimizer) -> None:
        """Page the state from now on, if a parameter is on a device whose state is paged: it is not on a CPU.

        It is called again before each step: parameters may move before the first one, and an optimizer's own
        `load_state_dict` replaces the state.
        """
        devices = {param.device for group in optimizer.param_groups for param in group["params"]}
        if not isinstance(optimizer.state, PagedState) and any(self._pool(device) for device in devices):
            optimizer.state = PagedState(self.page, self._before_read, optimizer.state)

    def _before_read(self) -> None:
        if not self._in_update:  # in an update the optimizer launches kernels, which wait for the prefetch
            self._synchronize()

    def _synchronize(self) -> None:
        for pool in self.pools:
            pool.synchronize()

    def _pool(self, device: torch.device) -> Pool | None:
        if device not in self._pools:
            self._pools[device] = open_pool(device)
        return self._pools[device]

    def _is_large(self, tensor: Tensor) -> bool:
        return tensor.layout == torch.strided and tensor.numel() >= self._min_numel

    def _can_page(self, param: Any, tensor: Tensor) -> bool:
        if not self._is_large(tensor):
            return False
        storage = tensor.untyped_storage()
        others = [t.data for t in (param, getattr(param, "grad", None)) if isinstance(t, Tensor)]
        used = {other.untyped_storage().data_ptr() for other in tensors_in(others)}
        return storage.nbytes() == tensor.nbytes and storage.data_ptr() not in used

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._in_update = False  # the step before may have raised
        self._observe(optimizer)
        return before_update(args, kwargs, lambda: self._begin_update(optimizer))

    def _begin_update(self, optimizer: Optimizer) -> None:
        self._in_update = True
        self.prefetch()
        self.wait_prefetch()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self.pools:  # nothing is paged, so a step does not read all of its state
            return
        for param, state in dict.items(optimizer.state):
            values = dict.values(state) if isinstance(state, dict) else [state]
            for value in values:
                if not isinstance(value, Tensor):  # a list in the state may have grown since it was set
                    self.page(param, value)
        self.evict()
        self._in_update = False

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Remove large tensors from the state dict: torch would put all of them on the device at once."""
        states = dict(state_dict["state"])
        self._large = []
        for index, param, state in saved_states(optimizer, state_dict):
            pool = self._pool(param.device)
            states[index] = {}
            for key, value in state.items():
                if pool is not None and key != "step" and type(value) is Tensor and self._is_large(value):
                    self._large.append((pool, param, key, value))
                else:
                    states[index][key] = value
        return {**state_dict, "state": states}

    def _after_load(self, optimizer: Optimizer) -> None:
        self._observe(optimizer)
        for pool, param, key, value in self._large:
            dtype = value.dtype
            if param.is_floating_point():
                dtype = param.dtype  # torch's rule (Optimizer.load_state_dict)
            optimizer.state[param][key] = pool.new_tensor(value, dtype)
        self._large = []


_PAGES: weakref.WeakKeyDictionary[Optimizer, OptimizerPages] = weakref.WeakKeyDictionary()


def page_optimizer(optimizer: Optimizer, min_numel: int) -> OptimizerPages:
    """Page the state of an optimizer; one that is paged already keeps its pages."""
    if optimizer not in _PAGES:
        _PAGES[optimizer] = OptimizerPages(optimizer, min_numel)
    return _PAGES[optimizer]


def _to_plain_dicts(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Remove our types from a state dict: checkpoints are the same with and without paging."""
    states = dict(state_dict["state"])
    for index, state in states.items():
        if isinstance(state, dict):
            states[index] = dict(state)
    return {**state_dict, "state": states}


def open_pool(device: torch.device) -> Pool | None:
    """A pool for the state on a device: unified memory where it pages, else pinned memory; None if it needs none."""
    if device.type != "cuda":  # on a CPU it is in host memory already
        return None
    reason = why_not_managed(device)
    if reason is None:
        return ManagedPool(device)
    rank_zero_info(f"Optimizer state on {device} is paged through pinned memory and explicit copies: {reason}.")
    return PinnedPool(device, reason)
