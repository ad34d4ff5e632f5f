"""Who computes each op on a device: Triton's kernels where they compute the right values, else plain torch."""

import os
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_qlora.kernels import eager, scratch
from lightning_qlora.kernels.half import Half
from lightning_qlora.kernels.lora import LoRA, check_operands
from lightning_qlora.kernels.self_test import OPS, faults, function_of
from lightning_qlora.kernels.verdict import KERNELS, is_out_of_memory, verdict
from lightning_qlora.quantization.packed_weight import PackedBytes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read once, as Triton does
PLANNED = ("lora_project", "linear_into", "linear_backward")  # methods of a plan
MAX_PLANS = 4096  # that are kept: one for every shape of an input and of a layer


class Backend:
    """The ops on a device, by the kernels of a module: Triton's, or those of `eager`; `reference` specifies them.

    Where a kernel of Triton fails, `eager` computes that op.
    """

    failures: dict[str, str]  # the ops that `eager` computes, each with what its kernels do wrong
    quantize: Callable[..., PackedBytes]
    dequantize: Callable[..., Tensor]
    rows_to_half: Callable[..., Half]
    take_out: Callable[..., Tensor]
    grouped_linear: Callable[..., tuple[Tensor, Tensor]]
    grouped_linear_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    can_group: Callable[..., bool]  # whether the two functions above can compute some experts, and are fast

    def __init__(self, device: torch.device, kernels: Any = eager) -> None:
        self.device = device
        self.kernels = kernels
        self.failures = {}
        self.plans: dict[tuple[Any, ...], eager.Plan] = {}
        for op in OPS:
            if op not in PLANNED:
                setattr(self, op, self._guarded(op, function_of(kernels, op), function_of(eager, op)))
        self.can_group = kernels.can_group

    def new_plan(self, x: Tensor, lora: LoRA, weight: PackedBytes, types: eager.Types | None = None) -> eager.Plan:
        plan: eager.Plan = self.kernels.plan(x, lora, weight, types)
        if self.kernels is not eager:
            plain = eager.plan(x, lora._replace(in_fp16=plan.in_fp16), types=types)
            guarded = {op: self._guarded(op, getattr(plan, op), getattr(plain, op)) for op in PLANNED}
            plan.replace(rows_to_half=self.rows_to_half, **guarded)
        return plan

    def _guarded(self, op: str, kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        """The op with kernels; plain torch computes it anew where a variant does not compile or launch."""
        failures = self.failures

        def run(*arguments: Any) -> Any:
            if op in failures:
                return plain(*arguments)
            try:
                return kernel(*arguments)
            except Exception as error:  # Triton, its compilers and the driver raise many types
                return self._repeat(op, kernel, plain, arguments, error)

        if self.kernels is eager:
            return plain
        return run

    def _repeat(
        self,
        op: str,
        kernel: Callable[..., Any],
        plain: Callable[..., Any],
        arguments: tuple[Any, ...],
        error: Exception,
    ) -> Any:
        if isinstance(error, torch.OutOfMemoryError) or scratch.is_capturing(self.device):
            raise error
        if is_out_of_memory(error):
            torch.cuda.empty_cache()
            return kernel(*arguments)
        result = plain(*arguments)  # raises as well if the arguments are wrong or the device is lost
        self.fall_back({op: f"{type(error).__name__}: {error}"})
        return result

    def fall_back(self, failures: dict[str, str]) -> None:
        """Compute these ops, of which the kernels do something wrong, in plain torch from now on, and say so."""
        if not failures:
            return
        self.failures |= failures
        if any(op.startswith("grouped") for op in failures):
            self.can_group = eager.can_group
        scratch.release()  # of a kernel that failed, the counters of shared sums may be wrong
        name = "Triton's interpreter"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        warnings.warn(
            f"{name} ({self.device}): plain torch computes {', '.join(failures)}, because the Triton kernels fail. The "
            f"results are right, and slower. {'; '.join(f'{op}: {why}' for op, why in failures.items())}. "
            "`lightning-qlora doctor --check` checks them again.",
            stacklevel=3,
        )


UNTRIED = ("mps",)  # types of devices on which nobody has run this package
_backends: dict[torch.device, Backend] = {}


def backend(device: torch.device) -> Backend:
    """What computes on a device: Triton's kernels on a GPU or under TRITON_INTERPRET=1, else those of `eager`."""
    previous = _backends.get(device)
    if previous is not None:
        return previous
    if has_kernels(device):
        return _make(device)
    if device.type in UNTRIED:
        return _try(device)
    return _backends.setdefault(device, Backend(device))


def plan_of(
    x: Tensor, weight: PackedBytes, bias: Tensor | None, lora: LoRA, types: eager.Types | None = None
) -> eager.Plan:
    """How a layer is computed; its operands are checked, because only those that fit have a plan.

    `types`: see `eager.plan`, for a device that `casts_inside`.
    """
    packed, absmax, nested, shape, quant_type, block_size = weight
    a, b, _, p, seed, in_fp16 = lora
    device = x.device
    # What decides whether and how a layer is computed: neither values nor addresses, which differ in each call. The
    # checks, and what makes a plan, read nothing else of the operands.
    facts = (
        (x.shape, x.dtype, device),
        (a.shape, a.dtype, a.device),
        (b.shape, b.dtype, b.device),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        (packed.numel(), packed.dtype, packed.device),
        (absmax.numel(), absmax.dtype, absmax.device),
        (nested.numel(), nested.dtype, nested.device),
        (shape, quant_type, block_size),
        None if seed is None else p,
        in_fp16,
        types,
    )
    computes = _backends.get(device) or backend(device)
    plan = computes.plans.get(facts)
    if plan is None:
        check_operands(x, weight, bias, lora)
        if len(computes.plans) >= MAX_PLANS:
            computes.plans.clear()
        plan = computes.plans[facts] = computes.new_plan(x, lora, weight, types)
    return plan


def has_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels are for this type of device; ROCm devices are also named "cuda"."""
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")


def casts_inside(device: torch.device) -> bool:
    """Whether kernels cast x in fp32, and torch multiplies 16 bits to fp32 (not on AMD)."""
    return backend(device).kernels is not eager and torch.version.hip is None


def failures(device: torch.device, repeat: bool = False) -> dict[str, str]:
    """The ops whose kernels are not used on a device, each with what they do wrong; `repeat` checks all again now."""
    if repeat and has_kernels(device):
        return _make(device, repeat).failures
    return backend(device).failures


def describe(device: torch.device) -> str:
    """What computes on a device, as a text for users: results of another one differ in their last bits."""
    found = backend(device)
    if found.kernels is eager:
        if device.type == "cpu":
            return eager.path()
        return "plain torch"
    return ", ".join(["Triton kernels", *(f"{op} in plain torch" for op in OPS if op in found.failures)])


def agree(device: torch.device) -> None:
    """Let an op fall back on all ranks if it does on one. All ranks must call it, as for wrapping a module in DDP.

    Another host, or another card, has its own verdict. `device` is where this rank has its layers.
    """
    if not (has_kernels(device) and dist.is_available() and dist.is_initialized()):
        return
    ours = backend(device)
    failed = torch.tensor([ours.kernels is eager or op in ours.failures for op in OPS], device=device).int()
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if ours.kernels is not eager:
        others = [op for op, fails in zip(OPS, failed.tolist(), strict=True) if fails and op not in ours.failures]
        ours.fall_back(dict.fromkeys(others, "fails on another rank"))


def _try(device: torch.device) -> Backend:
    """`eager`, with a warning if torch lacks what an op needs on the device or computes other values there."""
    result = _backends[device] = Backend(device)
    wrong = "; ".join(f"{op}: {why}" for op, why in faults(eager, device).items() if why)
    if wrong:
        warnings.warn(
            f"{device}: torch has not all that 4-bit layers need, or computes other values ({wrong}). This package was "
            'never run on such a device. Use accelerator="cpu"',
            stacklevel=3,
        )
    return result


def _make(device: torch.device, repeat: bool = False) -> Backend:
    """Triton's backend; `eager`, with one warning, if no kernel runs on the device.

    What is no fault of the kernels is an error, and nothing is kept: the next use checks them.
    """
    is_started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # a build for CPUs has no captures
    if is_started and scratch.is_capturing(device):
        raise RuntimeError(
            f"4-bit layers compute on {device} for the first time, inside the capture of a CUDA graph, where their "
            "kernels can't be checked. Run the module there once before the capture."
        )
    try:
        result = _checked(device, repeat)
    except Exception as error:
        if is_out_of_memory(error):
            torch.cuda.empty_cache()
            result = _checked(device, repeat)
        else:
            warnings.warn(
                f"Triton kernels do not run on {device} ({type(error).__name__}: {error}), so 4-bit layers run in "
                "eager PyTorch there. The results are the same, but a matmul takes several passes over memory. Install "
                "Triton (for CUDA `pip install triton`, on Windows `triton-windows`) and a C compiler (or set the "
                "variable CC).",
                stacklevel=3,
            )
            result = Backend(device)
    _backends[device] = result
    return result


def _checked(device: torch.device, repeat: bool) -> Backend:
    kernels = import_module(KERNELS)
    kernels.check_launch(device)
    found = {op: why for op, why in verdict(device, repeat).items() if why}
    result = Backend(device, kernels)
    result.fall_back(found)
    return result
