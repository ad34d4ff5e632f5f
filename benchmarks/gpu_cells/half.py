"""A layer with products in fp16 with a power of two (`kernels/half.py`), in bf16 and in fp32: time, and error to fp64.

Inputs have 1e6 and gradients 1e-9 as their size. On a T4 fp16 should take a quarter of fp32's time (docs/kernels.md).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.gpu_cells import Row
from benchmarks.timing import times
from lightning_qlora import convert

SIZES = {"x": 1e6, "grad": 1e-9}
KINDS = {"fp16": torch.float32, "bf16": torch.bfloat16, "fp32": torch.float32}  # type of x and of the results


def layer(width: int, kind: str, device: torch.device) -> nn.Module:
    """A layer that computes in a type."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, width, bias=False, device=device))
    convert(net, r=16, lora_dropout=0.0, compute_dtype=kind)
    return net[0].train()


def passes(net: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Forward and backward."""

    def run() -> tuple[Tensor, Tensor]:
        rows = x.detach().requires_grad_()
        y = net(rows)
        (grad_x,) = torch.autograd.grad(y, rows, grad)
        return y.detach(), grad_x

    return run


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """Microseconds of both passes, and the errors of y and of the gradient of x."""
    width = 128 if small else 4096
    for m in (4, 32) if small else (1, 16, 512, 4096):
        x = torch.randn(m, width, device=device) * SIZES["x"]
        grad = torch.randn(m, width, device=device) * SIZES["grad"]
        layers = {kind: layer(width, kind, device) for kind in KINDS}
        weight = layers["fp32"].decode().double()  # type: ignore[operator]
        exact = x.double() @ weight.T, grad.double() @ weight  # B is 0
        runs = {kind: passes(net, x.to(KINDS[kind]), grad.to(KINDS[kind])) for kind, net in layers.items()}
        taken = times(runs, device, rounds=2 if small else 20, head_start=2.0)
        for kind, run in runs.items():
            errors = [((ours.double() - y).norm() / y.norm()).item() for ours, y in zip(run(), exact, strict=True)]
            yield {"type": kind, "rows": m, "us": [1e6 * time for time in taken[kind]], "errors": errors}
