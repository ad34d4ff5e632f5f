"""WithAdapter: a part of a module that has an adapter. It says what of it trains, and can compute without."""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

DISABLED = "_qlora_disabled"  # attribute: how many contexts a part is in; absent in none, which torch.compile guards on


class WithAdapter(nn.Module):
    """A part of a module that computes with an adapter, or without it in a context of `disable_adapter`."""

    _qlora_disabled: int = 0
    row_count: int = 0  # of the rows that it trains of a weight; 0: of all

    def adapter_parameters(self) -> list[nn.Parameter]:
        raise NotImplementedError

    def trains_instead(self) -> dict[str, nn.Parameter]:
        """What trains in place of the weight: by its name in the module that had the weight."""
        raise NotImplementedError

    def reported_name(self, name: str) -> str:
        """What reports and files call the module of this name."""
        return name

    def rows_that_train(self) -> list[int]:
        return []

    def reset_rows(self, modules: Iterable[nn.Module]) -> None:
        """Let these rows begin with the values that the weight in one of the modules has."""

    def end(self, modules: Iterable[nn.Module]) -> None:
        """All layers among the modules are dense: let other parts with this adapter be so."""

    def __getstate__(self) -> Any:
        """The attributes of a copy or pickle: the contexts are those of this object, and a copy is in none."""
        of_class = getattr(super(), "__getstate__", None)  # object has it from Python 3.11 on
        state: Any = vars(self) if of_class is None else of_class()
        if self._qlora_disabled:
            state = {**state}
            state.pop(DISABLED, None)  # another thread may have left the context
            warnings.warn(
                "A copy, or a pickle, that is made inside disable_adapter has its adapter enabled. A reference model "
                "needs no copy: call the module itself inside disable_adapter.",
                stacklevel=2,
            )
        return state
