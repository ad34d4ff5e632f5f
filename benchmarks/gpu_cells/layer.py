"""One linear layer with an adapter of rank 64, for 1 to 4096 rows: ours, bf16 with LoRA, bitsandbytes with LoRA.

All run under autocast to bf16 with fp32 adapters, as in a training step. "device_us" is the time of the kernels with a
cold L2 cache. "call_us" is the time per call in a series of calls, which includes the host time of the launches.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.gpu_cells import Row
from benchmarks.timing import Function, call_seconds, times
from lightning_qlora import convert

SHAPES = {"q, o": (4096, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)}  # of an 8B Llama, [out, in]
ROWS = (1, 8, 32, 64, 128, 512, 4096)


class WithAdapter(nn.Module):
    """A base layer with an adapter, computed as PEFT does: base(x) + s B(A(dropout(x)))."""

    def __init__(self, base: nn.Module, shape: tuple[int, int], r: int, dropout: float, device: torch.device) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Linear(shape[1], r, bias=False, device=device)
        self.lora_B = nn.Linear(r, shape[0], bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(self.dropout(x))) * 0.25


def layers(shape: tuple[int, int], r: int, dropout: float, device: torch.device) -> dict[str, nn.Module]:
    """The same layer in each variant."""
    dense = nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=torch.bfloat16)
    ours = nn.Sequential(copy.deepcopy(dense))
    convert(ours, r=r, lora_alpha=r / 4, lora_dropout=dropout)
    made = {peers.OURS: ours[0], peers.DENSE: WithAdapter(copy.deepcopy(dense), shape, r, dropout, device)}
    if peers.why_missing("bitsandbytes") is None:
        made[peers.BNB] = WithAdapter(peers.bnb_linear(dense), shape, r, dropout, device)
    return made


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """Microseconds of forward in eval mode, and of forward + backward in training mode with dropout."""
    shapes = {"small": (128, 64)} if small else SHAPES
    r = 4 if small else 64
    if reason := peers.why_missing("bitsandbytes"):
        yield {"variant": peers.BNB, "skipped": reason}
    for name, shape in shapes.items():
        # bitsandbytes on a CPU repacks its weight in eval mode and cannot train afterwards: use separate layers.
        evaluated, trained = (layers(shape, r, 0.05, device) for _ in range(2))
        for m in ROWS[:3] if small else ROWS:
            x = torch.randn(m, shape[1], device=device, dtype=torch.bfloat16)
            for kind, made, run in (("forward", evaluated, _forward), ("forward + backward", trained, _backward)):
                functions = {key: run(layer, x) for key, layer in made.items()}
                taken = times(functions, device, rounds=3 if small else 20, head_start=2.0)
                calls = call_seconds(functions, device, rounds=2 if small else 5)
                yield {
                    "shape": name,
                    "rows": m,
                    "pass": kind,
                    "device_us": {key: 1e6 * sorted(values)[len(values) // 2] for key, values in taken.items()},
                    "call_us": {key: 1e6 * value for key, value in calls.items()},
                }


def _forward(layer: nn.Module, x: Tensor) -> Function:
    layer.eval()

    def run() -> None:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
            layer(x)

    return run


def _backward(layer: nn.Module, x: Tensor) -> Function:
    layer.train()
    x = x.detach().requires_grad_()
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    grad = torch.randn(len(x), _width(layer, x), device=x.device, dtype=torch.bfloat16)

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None  # as after zero_grad: the first gradient is stored, not accumulated
        with torch.autocast(x.device.type, torch.bfloat16):
            y = layer(x)
        y.backward(grad)

    return run


def _width(layer: Callable[[Tensor], Tensor], x: Tensor) -> int:
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        return layer(x[:1]).shape[-1]
