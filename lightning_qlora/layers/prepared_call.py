"""PreparedCall: how a layer computes, asked once for calls that differ in the values and the shape of x alone.

A call asks in which type it computes, whether its operands fit together, and how they are computed, which is a plan.
The answers hold for calls with the same tensors and settings of the layer, the same state of torch, and x of one type.
A layer keeps its last call: the next one asks only whether all of that is the same.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qlora.kernels.backends import casts_inside, plan_of
from lightning_qlora.kernels.eager import Plan, Types
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import is_plain_call, lora_linear, run_plan

PLAIN = (Tensor, nn.Parameter)
MAX_SHAPES = 64  # of x, whose plans a layer keeps
# To find a name in a module takes as long as the question.
_has_autocast = torch.is_autocast_enabled
_tracing_state = torch._C._get_tracing_state
_has_transforms = torch._C._are_functorch_transforms_active
_count_modes = torch._C._len_torch_dispatch_stack


class PreparedCall:
    """Of a layer with one of its matrices, for x of one type on one device."""

    def __init__(self, layer: Any, x: Tensor, matrix: Any, bias: Tensor | None) -> None:
        _, a, b, *_ = matrix
        self._kind = x.device.type
        self._of_x, in_fp16, self._of_y = layer.types_of_call(x.device, x.dtype)
        p = layer.lora_dropout
        # `functional_call` brings an A of its own, whose graph would be kept.
        is_kept = type(a) is nn.Parameter and layer.input_observer is None
        if layer._qlora_disabled:
            is_kept = False
            a = x.new_empty(0, a.shape[1], dtype=self._of_x)  # rank 0
            b = x.new_empty(b.shape[0], 0, dtype=self._of_x)
            p = 0.0
        self._matrix = matrix
        self._bias = bias
        self._lora = LoRA(a, b, layer.scaling, p, None, in_fp16)
        self._is_plain = not matrix.reads_weight and is_plain_call(x, a)
        self._types: Types | None = None
        is_wide = x.dtype is torch.float32 and self._of_x is torch.bfloat16 and self._of_y in (x.dtype, self._of_x)
        if is_wide and self._is_plain and not layer._qlora_disabled and casts_inside(x.device):
            self._types = self._of_x, self._of_y
            self._of_x = torch.float32  # kernels cast it
        self._plans: dict[tuple[torch.Size, bool], Plan] = {}
        self.facts: tuple[Any, ...] | None = None  # what decides; None: not to be kept
        if is_kept and self._is_plain:
            self.facts = self.facts_of(layer, x, bias)

    def __reduce__(self) -> Any:
        """A copy or pickle of a layer has none, and prepares its own."""
        return type(None), ()

    def facts_of(self, layer: Any, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        """What decides how the layer with its own matrix computes x, besides values and the shape of x.

        `.data =` changes all but the identity of a tensor, so types, shapes and devices are asked. Addresses are asked
        where tensors are read, since FSDP moves them in each step.
        """
        (packed, absmax, nested, *_), a, b, *_ = self._matrix
        parameters = layer._parameters
        kind = self._kind
        return (
            type(x) in PLAIN,
            parameters.get("lora_A") is a,
            parameters.get("lora_B") is b,
            layer.packed is packed,
            layer.absmax is absmax,
            layer.nested is nested,
            bias is self._bias,
            x.dtype,
            x.device,
            a.shape,
            a.dtype,
            a.device,
            b.shape,
            b.dtype,
            b.device,
            None if bias is None else (bias.shape, bias.dtype, bias.device),
            packed.shape,
            packed.dtype,
            packed.device,
            absmax.shape,
            absmax.dtype,
            absmax.device,
            nested.shape,
            nested.dtype,
            nested.device,
            layer.config,
            layer.weight_dtype,
            layer.dtype_before,
            layer.scaling,
            layer.lora_dropout,
            layer.input_observer,
            layer._qlora_disabled,
            (torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()) if _has_autocast(kind) else None,
            _tracing_state(),
            _has_transforms(),
            _count_modes(),
        )

    def run(self, layer: Any, x: Tensor, rank: int = 0) -> Tensor:
        """y; ranks with other numbers drop others."""
        if x.dtype is not self._of_x:
            x = cast_input(x, self._of_x)
        lora = self._lora
        drops = layer.training and lora.p > 0
        if drops:
            # From torch's generator: a recomputed forward pass (activation checkpointing) draws it again.
            seed = torch.randint(1 << 62, (1,), device="cpu")
            if rank:
                seed ^= rank << 32
            a, b, scaling, p, _, in_fp16 = lora
            lora = LoRA(a, b, scaling, p, seed, in_fp16)
        if self._is_plain:
            plan = self._plans.get((x.shape, drops)) or self._add_plan(x, lora, drops)
            y = run_plan(plan, x, self._matrix.weight, self._bias, lora)
        else:
            y = self.product(layer, x, lora)
        return y if y.dtype is self._of_y else y.to(self._of_y)  # `to` takes as long as a small product

    def product(self, layer: Any, x: Tensor, lora: LoRA) -> Tensor:
        return lora_linear(x, self._matrix.weight, self._bias, lora)

    def _add_plan(self, x: Tensor, lora: LoRA, drops: bool) -> Plan:
        if len(self._plans) >= MAX_SHAPES:
            self._plans.clear()
        plan = self._plans[x.shape, drops] = plan_of(x, self._matrix.weight, self._bias, lora, self._types)
        return plan


def cast_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.is_floating_point():  # the result would be rounded to integers
        raise TypeError(
            f"x: must be float32, bfloat16 or float16 (or float64, computed in float32), not {x.dtype}. Cast it first."
        )
    return x.to(dtype)
