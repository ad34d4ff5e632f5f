"""Kernel launches and host time of one linear layer and of a decoder layer of Llama-8B, in training mode.

torch's profiler counts the kernels of forward and backward separately. Linear layers run with and without dropout.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks import llama, peers
from benchmarks.gpu_cells import Row
from benchmarks.gpu_cells.layer import layers
from benchmarks.timing import Function, call_seconds, host_seconds, synchronize, times

TOP = 12  # kernels of a decoder layer that are listed by name


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """Number of kernels and host microseconds of each layer."""
    shape, m, r = ((128, 64), 8, 4) if small else ((4096, 4096), 512, 64)
    for dropout in (0.05, 0.0):
        for name, layer in layers(shape, r, dropout, device).items():
            x = torch.randn(m, shape[1], device=device, dtype=torch.bfloat16, requires_grad=True)
            part = {"part": "linear layer", "variant": name, "dropout": dropout}
            yield {**part, **_passes(layer.train(), lambda layer=layer, x=x: layer(x), x, device)}
    yield from _in_a_graph(shape[0], r, device)
    sizes = {**(llama.SMALL if small else llama.LLAMA_8B), "num_hidden_layers": 1, "vocab_size": 128}
    for name, variant in llama.VARIANTS.items():
        if reason := peers.why_missing(*variant.packages):
            yield {"part": "decoder layer", "variant": name, "skipped": reason}
            continue
        model = llama.build(sizes, variant, r, device)
        tokens = torch.randint(128, (1, 16 if small else 2048), device=device)
        hidden = lambda model=model, tokens=tokens: model.model(input_ids=tokens).last_hidden_state  # noqa: E731
        part = {"part": "decoder layer, checkpointed", "variant": name, "dropout": llama.DROPOUT}
        yield {**part, **_passes(model, hidden, None, device, top=TOP)}


def _in_a_graph(width: int, r: int, device: torch.device) -> Iterator[Row]:
    """One row through layers that Python launches, and in a CUDA graph of torch.compile, as in generation."""
    net = nn.Sequential(*(layers((width, width), r, 0.0, device)[peers.OURS] for _ in range(8))).eval()
    options: dict[str, Any] = {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "aot_eager"}
    x = torch.randn(1, width, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        functions: dict[str, Function] = {
            name: lambda run=run: run(x)
            for name, run in {"launched": net, "in a graph": torch.compile(net, **options)}.items()
        }
        took = call_seconds(functions, device)
    for name, value in took.items():
        yield {"part": "eight layers, one row", "variant": name, "dropout": 0.0, "call_us": 1e6 * value}


def _passes(
    module: nn.Module, forward: Callable[[], Tensor], x: Tensor | None, device: torch.device, top: int = 0
) -> Row:
    leaves = [*([] if x is None else [x]), *llama.adapters(module)]
    outputs: list[Tensor] = []

    def run_forward() -> None:
        outputs.clear()
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            outputs.append(forward())

    def run_backward() -> None:
        outputs[0].backward(torch.ones_like(outputs[0]))

    def run_both() -> None:
        run_forward()
        run_backward()

    for _ in range(3):
        run_both()
    counted = {"forward": _kernels(run_forward, device), "backward": _kernels(run_backward, device)}
    row: Row = {f"{name}_kernels": sum(kernels.values()) for name, (kernels, _) in counted.items()}
    rounds = 30 if device.type == "cuda" else 3
    row["forward_host_us"] = 1e6 * host_seconds(run_forward, device, rounds)
    row["both_host_us"] = 1e6 * host_seconds(run_both, device, rounds)
    row["both_device_us"] = 1e6 * sorted(times({"both": run_both}, device, rounds=5, head_start=5.0)["both"])[2]
    if top:
        spent: Counter[str] = Counter()
        for _, microseconds in counted.values():
            spent.update(microseconds)
        row["top_kernels_us"] = {name[:80]: round(value, 1) for name, value in spent.most_common(top)}
    return row


def _kernels(function: Function, device: torch.device) -> tuple[Counter[str], Counter[str]]:
    """Launches and microseconds of each kernel, without memory copies and fills. Empty on a CPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    synchronize(device)
    with profile(activities=activities) as profiled:
        function()
        synchronize(device)
    launched = Counter[str]()
    spent = Counter[str]()
    for event in profiled.key_averages():
        if event.device_type == DeviceType.CUDA and not event.key.startswith(("Memcpy", "Memset")):
            launched[event.key] += event.count
            spent[event.key] += event.self_device_time_total
    return launched, spent
