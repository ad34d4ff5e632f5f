"""Calibration: `init_lora_weights="calibrated"` initializes adapters from the batches of an optimizer's first step.

Until then B is 0, so the module computes what its 4-bit base computes, and its own forward passes show the inputs of
every layer. A hook of each layer sums their squares; at the first step of an optimizer, after its backward passes, the
adapters in it are initialized. Their gradients belong to the values before and are dropped, so the first step does not
change them. All batches that make the step count, on all ranks.
"""

import warnings
import weakref
from collections.abc import Callable, Collection, Mapping
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_qlora.adapters.conversion import conversion_of
from lightning_qlora.layers import initialization
from lightning_qlora.layers.dtensor import gather, of_all_ranks, world_size
from lightning_qlora.layers.lora_layer import LoRALayer
from lightning_qlora.layers.qlora_linear import adapted_layers
from lightning_qlora.layers.routed_experts import rows_of_experts
from lightning_qlora.training.optimizers import parameters_of
from lightning_qlora.training.report import CalibrationReport


class Calibration:
    """Measures the inputs of the layers until their adapters are initialized; see the top of this file.

    Attributes:
        report: The status of the layers.
    """

    def __init__(self, root: nn.Module, sharded: bool = False) -> None:
        self._layers = {name: layer for name, layer in adapted_layers(root).items() if layer.dense_weight is not None}
        if sharded and world_size() > 1:
            _keep_weights_of_this_rank(self._layers.values())
        weights: list[Any] = [layer.dense_weight for layer in self._layers.values()]
        self.report = CalibrationReport(list(self._layers), sum(w.nbytes for w in weights if not w.is_meta))
        self._warned = False
        self._sums: dict[str, Tensor] = {}  # of each matrix: squares of each input, number of finite rows, of all rows
        # Name -> A, B: what a state dict from before the calibration needs, until a newer one is saved.
        self._initial: dict[str, tuple[Tensor, Tensor]] = {}
        self._hooks = {
            name: layer.register_forward_pre_hook(partial(self._add_input, name), with_kwargs=True)
            for name, layer in self._layers.items()
        }
        root._qlora_calibration = self  # type: ignore[assignment]
        root.register_state_dict_post_hook(_after_state_dict)  # type: ignore[no-untyped-call]
        root.register_load_state_dict_post_hook(_after_load_state_dict)  # type: ignore[no-untyped-call]
        _start(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled module waits for its own first step."""
        vars(self).update(state)
        if self.report.waiting:
            _start(self)

    def _add_input(self, name: str, layer: LoRALayer, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        """Add the rows of one input to the sums of a layer. A row with NaN or Inf (masked padding) does not count."""
        inputs = [*args, *kwargs.values()]
        x = inputs[0].detach()
        if not (layer.training and torch.is_grad_enabled() and x.is_floating_point()):
            return
        if name not in self._sums:
            self._sums[name] = _no_sums(layer, x.device)
        if layer.is_stack:
            numbers, parts = rows_of_experts(x, inputs[1])
        else:
            numbers = [0]
            parts = [x.reshape(-1, x.shape[-1])]
        for number, rows in zip(numbers, parts, strict=True):
            sums = self._sums[name][number]
            if rows.dtype is torch.float64:
                rows = rows.float()
            sums[-1] += len(rows)
            squares = _sums_of_squares(rows)
            if not torch.isfinite(squares).all():
                rows = rows[torch.isfinite(rows).all(dim=1)]
                squares = _sums_of_squares(rows)
            sums[:-2] += squares
            sums[-2] += len(rows)

    def before_step(self, optimizer: Optimizer) -> None:
        """Initialize the adapters that an optimizer holds, after the backward passes of its first step."""
        parameters = {id(parameter) for parameter in parameters_of(optimizer)}
        layers = {name: layer for name, layer in self._waiting_layers().items() if id(layer.lora_B) in parameters}
        if layers:
            self.initialize(layers)

    @torch.no_grad()
    def initialize(self, layers: Mapping[str, LoRALayer] | None = None) -> None:
        """Initialize waiting layers (None: all) from the inputs that they had so far; without any input do nothing."""
        start = perf_counter()
        if layers is None:
            layers = self._waiting_layers()
        sums = self._sums_of_all_ranks(layers)
        if not any(total[:, -1].any() for total in sums.values()):
            if any(layer.lora_B.grad is not None for layer in layers.values()):
                first = next(iter(layers))
                raise RuntimeError(
                    f"init_lora_weights='calibrated': the optimizer steps before the adapter of {first} is calibrated, "
                    "because no forward pass ran in training mode. Call model.train() before it."
                )
            return  # a step without a backward pass, to create the optimizer's state
        rms = {name: _root_mean_square(name, total) for name, total in sums.items()}  # an error changes no adapter
        for name, rank in _ranks_with_weights(layers).items():
            self._initialize(name, rms[name], rank)
        rows = max(int(total[:, -2].max()) for total in sums.values())
        self.report.rows = max(self.report.rows, rows)
        self.report.seconds += perf_counter() - start
        if self.report.waiting:
            return
        _end(self)
        rank_zero_info(f"QLoRA: {self.report}")

    def _initialize(self, name: str, rms: Tensor, rank: int) -> None:
        layer = self._layers[name]
        self._stop_waiting(name)
        if gather(layer.lora_B).any():
            layer.dense_weight = None
            self._warn(f"{name} was trained before its calibration, so its adapter is not changed")
            return
        self.report.input_rms[name] = layer.join_matrices(rms.cpu().unbind())
        errors = initialize_from_inputs(layer, rms, rank)
        drop_gradients(layer)
        seen = [error for error in errors if error is not None]
        if not seen:
            self.report.unseen.append(name)
            return
        self.report.unseen += [f"{name}.{number}" for number, error in enumerate(errors) if error is None]
        self.report.errors[name] = max(seen)
        self.report.calibrated.append(name)
        if layer.initial is not None:
            self._initial[name] = layer.initial

    def _sums_of_all_ranks(self, layers: Mapping[str, LoRALayer]) -> dict[str, Tensor]:
        sums = {}
        for name, layer in layers.items():
            device = initialization.solver_device(layer.packed.device)
            if name in self._sums:
                sums[name] = self._sums[name].to(device)
            else:
                sums[name] = _no_sums(layer, device)
        if world_size() > 1:
            flat = torch.cat([total.flatten() for total in sums.values()])
            dist.all_reduce(flat)
            parts = torch.split(flat, [total.numel() for total in sums.values()])
            sums = {name: part.view_as(sums[name]) for name, part in zip(sums, parts, strict=True)}
        return sums

    def cancel(self) -> None:
        """Free the dense weights and the initial values; no layer waits any more."""
        for name in list(self.report.waiting):
            self._stop_waiting(name)
        self._initial.clear()
        for layer in self._layers.values():
            if isinstance(layer, LoRALayer):  # not merged
                layer.dense_weight = None
        _end(self)

    def after_load(self, initialization: str) -> None:
        """Set the status of every layer by what was loaded: calibrated, not yet calibrated, or another adapter."""
        if initialization != "calibrated":
            self.cancel()
        for name, layer in self._layers.items():
            if not isinstance(layer, LoRALayer):
                continue
            if layer.initial is not None or gather(layer.lora_B).any():
                layer.dense_weight = None
                self._initial.pop(name, None)
                if name in self.report.waiting:
                    self._stop_waiting(name)
            elif name in self._initial:  # a state dict from before the calibration
                layer.set_adapter(*self._initial[name])
                layer.set_initial(*self._initial[name])
            elif name in self.report.calibrated:
                self._warn(
                    "the loaded state dict was saved before the calibration, and the dense weights are freed: "
                    f"{name} now has the default initialization. Load it into a newly built module instead"
                )
        if not self.report.waiting:
            _end(self)

    def _stop_waiting(self, name: str) -> None:
        self.report.waiting.remove(name)
        self._sums.pop(name, None)
        self._hooks.pop(name).remove()

    def _waiting_layers(self) -> dict[str, LoRALayer]:
        """Name -> layer that waits; without merged layers."""
        waiting = {name: self._layers[name] for name in self.report.waiting}
        return {name: layer for name, layer in waiting.items() if isinstance(layer, LoRALayer)}

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"init_lora_weights='calibrated': {reason}.", stacklevel=2)


# Those with layers that wait. One hook of torch serves all of them, also copies of a module.
_waiting: weakref.WeakSet[Calibration] = weakref.WeakSet()
_step_hook: RemovableHandle | None = None


def _start(calibration: Calibration) -> None:
    """Call `before_step` before each step of an optimizer.

    A compiled model runs eagerly until the adapters are initialized: torch.compile would keep the hooks of the layers.
    """
    global _step_hook
    _waiting.add(calibration)
    weakref.finalize(calibration, _remove_hook_if_none_waits)
    if _step_hook is None:
        _step_hook = register_optimizer_step_pre_hook(_before_step)
        torch.compiler.set_stance("force_eager")


def _end(calibration: Calibration) -> None:
    _waiting.discard(calibration)
    _remove_hook_if_none_waits()


def _remove_hook_if_none_waits() -> None:
    global _step_hook
    if _step_hook is not None and not list(_waiting):
        _step_hook.remove()
        _step_hook = None
        torch.compiler.set_stance("default")


def _before_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Initialize before `step()`, or inside `step(closure)` after the closure, which runs the backward pass."""

    def initialize() -> None:
        for calibration in list(_waiting):
            calibration.before_step(optimizer)

    def with_initialization(closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            loss = closure()
            initialize()
            return loss

        return run

    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": with_initialization(kwargs["closure"])}
    if len(args) > 1 and args[1] is not None:  # args[0] is the optimizer
        return (args[0], with_initialization(args[1]), *args[2:]), kwargs
    initialize()
    return None


@torch.no_grad()
def initialize_from_inputs(layer: LoRALayer, input_rms: Tensor, rank: int = 0) -> list[float | None]:
    """Initialize a waiting layer from the RMS of its inputs [matrices, in]: computed on one rank, then broadcast.

    Returns `initialization.calibrated_error` of each matrix; None if there is nothing to compute.
    """
    dense_weight = layer.dense_weight
    layer.dense_weight = None
    input_rms = input_rms.to(layer.packed.device)
    errors: list[float | None] = [None] * len(input_rms)
    pairs = zip(*(layer.split_matrices(gather(p)) for p in (layer.lora_A, layer.lora_B)), strict=True)
    adapters = [list(pair) for pair in pairs]
    if dense_weight is not None:
        bases = layer.packed_weights  # of a sharded layer all ranks gather the base
        device = layer.packed.device
        for number, weight in enumerate(layer.split_matrices(dense_weight)):
            if not input_rms[number].any():
                continue
            values = [torch.empty(part.shape, device=device) for part in adapters[number]]
            values.append(torch.empty((), device=device))
            if world_size() == 1 or dist.get_rank() == rank:
                with torch.autocast(device.type, enabled=False):
                    operands = weight.to(device, layer.weight_dtype), bases[number], input_rms[number]
                    adapter = initialization.calibrated_adapter(*operands, layer.config, layer.seed_name_of(number))
                    error = initialization.calibrated_error(*operands, *adapter, layer.scaling)
                values = [part.contiguous() for part in (*adapter, error)]
            if world_size() > 1:
                for value in values:
                    dist.broadcast(value, rank)
            *adapters[number], error = values
            errors[number] = float(error)
    lora_a, lora_b = (layer.join_matrices(parts) for parts in zip(*adapters, strict=True))
    if any(error is not None for error in errors):
        layer.set_adapter(lora_a, lora_b)
    layer.set_initial(lora_a, lora_b)
    return errors


def drop_gradients(layer: LoRALayer) -> None:
    """Let the step of an optimizer skip the adapter of a layer."""
    for parameter in layer.adapter_parameters():
        parameter.grad = None


def _no_sums(layer: LoRALayer, device: torch.device) -> Tensor:
    """The sums of a layer without inputs, fp64 [matrices, in + 2]; see `Calibration`."""
    device = initialization.solver_device(device)
    return torch.zeros(layer.matrix_count, layer.in_features + 2, dtype=torch.float64, device=device)


def _sums_of_squares(rows: Tensor) -> Tensor:
    """The sum of squares of each column, fp64 [in]."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32)
    return norms.to(initialization.solver_device(norms.device)).double().square()


def _root_mean_square(name: str, sums: Tensor) -> Tensor:
    """RMS of every input, fp32 [matrices, in]; zeros without an input, ValueError if every row has NaN or Inf."""
    result = (sums[:, :-2] / sums[:, -2:-1].clamp_min(1)).sqrt().float()
    no_finite_row = (sums[:, -1] > 0) & (sums[:, -2] == 0)
    if no_finite_row.any() or not torch.isfinite(result).all():
        raise ValueError(
            f"{name}: NaN or Inf in all its inputs in the batches that init_lora_weights='calibrated' uses, so "
            "training would fail too. Check the data and compute_dtype (fp16 overflows)."
        )
    return result


def _keep_weights_of_this_rank(layers: Collection[LoRALayer]) -> None:
    """Sharded layers: each rank keeps the float weights of its share of the layers, and computes their adapters."""
    weights: list[Any] = [layer.dense_weight for layer in layers]
    if any(weight.is_meta for weight in weights):
        return  # the ranks shared the work of loading
    for place, layer in enumerate(layers):
        if place % world_size() != dist.get_rank():
            layer.dense_weight = weights[place].to("meta")


def _ranks_with_weights(layers: Mapping[str, LoRALayer]) -> dict[str, int]:
    """Name -> rank that computes the adapter: one that has the float weight, so that the ranks share the work."""
    weights = {name: layer.dense_weight for name, layer in layers.items()}  # on meta where another rank has it
    names_of_ranks = of_all_ranks([name for name, w in weights.items() if w is not None and not w.is_meta])
    ranks = {}
    for place, name in enumerate(layers):
        candidates = [rank for rank, names in enumerate(names_of_ranks) if name in names] or [0]
        ranks[name] = candidates[place % len(candidates)]
    return ranks


def calibration_of(root: nn.Module | None) -> Calibration | None:
    """The calibration of a converted module, pending or done; None without one."""
    return None if root is None else vars(root).get("_qlora_calibration")


def _after_state_dict(root: nn.Module, *_: Any) -> None:
    calibration = calibration_of(root)
    if calibration is not None:
        calibration._initial.clear()  # the saved state has the calibrated adapters


def _after_load_state_dict(root: nn.Module, _: Any) -> None:
    calibration = calibration_of(root)
    conversion = conversion_of(root)
    if calibration is not None and conversion is not None:
        calibration.after_load(conversion.config.initialization)
