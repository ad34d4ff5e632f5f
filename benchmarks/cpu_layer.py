"""One layer on the CPU: forward and backward in training, forward in evaluation, and what a call costs by itself.

    python -m benchmarks.cpu_layer [--rounds 15] [--threads 2] [--rows 1 16 256 2048] [--write]

Twice: the 4-bit weight alone, against bitsandbytes' Linear4bit (ours has rank 0), with the gradient of the input; and
with an adapter of rank 16, against PEFT around that layer, with the gradients of the adapter as well. All calls take
turns in one process; bf16.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure, peers
from lightning_qlora import quantize
from lightning_qlora.kernels.lora import LoRA
from lightning_qlora.kernels.lora_linear import lora_linear

SHAPES = [(1024, 1024), (4096, 1024), (1024, 4096), (2048, 2048), (4096, 4096)]
WARMUP = 3


def _train(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward pass, and the gradient of the input."""
    return lambda: torch.autograd.backward(layer(x), grad)


def _evaluate(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def weight_alone(shape: tuple[int, int], m: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of calls with m rows: ours, a dense layer's, bitsandbytes' where it is there."""
    dense = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16).requires_grad_(False)
    packed = quantize(dense.weight).to_bytes()
    lora_a = torch.empty(0, shape[1])
    lora_b = torch.empty(shape[0], 0)
    made: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        peers.OURS: lambda: lambda x: lora_linear(x, packed, None, LoRA(lora_a, lora_b)),
        "dense": lambda: dense,
    }
    if find_spec("bitsandbytes") is not None:
        made["bitsandbytes"] = lambda: peers.bnb_linear(_copy(dense))
    return _both_modes(made, shape, m, rounds)


def with_adapter(shape: tuple[int, int], m: int, rounds: int, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """The same of layers with an adapter of rank 16."""

    def build(name: str) -> nn.Module:
        layer = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
        return peers.build(name, nn.Sequential(layer), 16)

    return _both_modes({name: (lambda name=name: build(name)) for name in names}, shape, m, rounds)


def _both_modes(
    made: dict[str, Callable[[], Callable[[Tensor], Tensor]]], shape: tuple[int, int], m: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Each layer is made twice: bitsandbytes packs its weight anew in evaluation, and drops the gradient afterwards."""
    x = torch.randn(m, shape[1]).bfloat16()
    grad = torch.randn(m, shape[0]).bfloat16()
    training = {name: _train(_mode(make(), True), x.clone().requires_grad_(), grad) for name, make in made.items()}
    evaluation = {name: _evaluate(_mode(make(), False), x) for name, make in made.items()}
    return {
        "training": measure.take_turns(training, rounds, WARMUP),
        "evaluation": measure.take_turns(evaluation, rounds, WARMUP),
    }


def _mode(layer: Any, training: bool) -> Any:
    return layer.train(training) if isinstance(layer, nn.Module) else layer


def _copy(dense: nn.Linear) -> nn.Linear:
    linear = nn.Linear(dense.in_features, dense.out_features, bias=False, dtype=dense.weight.dtype)
    linear.weight.data.copy_(dense.weight)
    return linear


class _LinearAndTwoProducts(nn.Module):
    """What an adapter costs at the least: the dense layer, two small products, a factor and a sum."""

    def __init__(self, size: int, r: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size, bias=False, dtype=dtype).requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, size, dtype=dtype))
        self.lora_B = nn.Parameter(torch.randn(size, r, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 2.0 * ((x @ self.lora_A.T) @ self.lora_B.T)


def cost_of_a_call(dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward at 64 x 64 with 64 rows, where the arithmetic costs next to nothing."""
    size = 64
    r = 8
    ours = peers.build(peers.OURS, nn.Sequential(nn.Linear(size, size, bias=False, dtype=dtype)), r)[0]  # type: ignore[index]
    grad = torch.randn(size, size, dtype=dtype)
    plain = _LinearAndTwoProducts(size, r, dtype)
    return measure.take_turns(
        {
            name: _train(layer, torch.randn(size, size, dtype=dtype).requires_grad_(), grad)
            for name, layer in {peers.OURS: ours, "nn.Linear + two products": plain}.items()
        },
        rounds,
    )


def _mean_and_range(values: list[float]) -> str:
    return f"{measure.geometric_mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 2048])
    parser.add_argument("--write", action="store_true", help="keep the JSON and refresh docs/benchmarks.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    ratios: dict[tuple[str, int, str], list[float]] = {}
    adapted = [name for name in peers.installed() if name in (peers.OURS, peers.BNB, peers.BNB_BF16, peers.DENSE)]
    for m, shape in product(options.rows, SHAPES):
        # Quick calls are repeated more often; what is slow is steady.
        rounds = options.rounds * (4 if m <= 16 else 1)
        for what, seconds in (
            ("alone", weight_alone(shape, m, rounds)),
            ("with adapter", with_adapter(shape, m, rounds, adapted)),
        ):
            found[f"{what}: {shape[0]} x {shape[1]}, {m} rows"] = seconds
            for mode, calls in seconds.items():
                ours = measure.median_ms(calls[peers.OURS])
                for name, values in calls.items():
                    ratios.setdefault((name, m, mode), []).append(ours / measure.median_ms(values))
    names = list(dict.fromkeys(name for name, _, _ in ratios if name != peers.OURS))
    lines = [
        [str(m), mode, *(_mean_and_range(ratios[name, m, mode]) for name in names)]
        for m, mode in product(options.rows, ("training", "evaluation"))
    ]
    heads = ["rows", "mode", *(f"ours / {name}" for name in names)]
    calls_table = []
    for dtype in (torch.float32, torch.bfloat16):
        seconds = cost_of_a_call(dtype, 60 * options.rounds)
        found[f"call, {dtype}"] = seconds
        ours, plain = (measure.median_ms(values) for values in seconds.values())
        calls_table.append(
            [str(dtype).removeprefix("torch."), f"{ours * 1e3:.0f}", f"{plain * 1e3:.0f}", f"{ours / plain:.2f}"]
        )
    markdown = (
        "Ratios of times, geometric mean over "
        + ", ".join(f"{out} x {columns}" for out, columns in SHAPES)
        + " (least and largest); against PEFT with adapters of rank 16, else without; training is forward and "
        + "backward:\n\n"
        + measure.table(heads, lines)
        + "\n\nA call by itself, forward and backward at 64 x 64 with an adapter of rank 8, microseconds:\n\n"
        + measure.table(["type", "ours", "nn.Linear + two products", "ours / that"], calls_table)
    )
    measure.publish("cpu_layer", {"seconds": found}, markdown, options.write)


if __name__ == "__main__":
    main()
