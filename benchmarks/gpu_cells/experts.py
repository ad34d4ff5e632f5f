"""One sparse block of Qwen3-MoE with adapters of rank 8: all experts together against one expert after another.

First the two are compared: the largest differences of gradients, relative to the largest value. They differ by the
order of sums. Then a forward and backward pass is timed, and its peak of memory above the block measured.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.experts import OURS, build
from benchmarks.gpu_cells import Row
from benchmarks.timing import Function, call_seconds, seconds
from lightning_qlora.experts import experts
from lightning_qlora.layers.lora_layer import ADAPTER

QWEN3_30B = {"hidden": 2048, "width": 768, "experts": 128, "active": 8}
MIXTRAL = {"hidden": 4096, "width": 14336, "experts": 8, "active": 2}
SMALL = {"hidden": 64, "width": 64, "experts": 4, "active": 2}
TOGETHER, ONE_BY_ONE = "together", "one by one"


def measure(device: torch.device, small: bool) -> Iterator[Row]:
    """Differences, seconds and bytes. On a CPU both variants are one by one."""
    shapes = {"small": SMALL} if small else {"Qwen3-30B-A3B": QWEN3_30B, "Mixtral-8x7B": MIXTRAL}
    for name, sizes in shapes.items():
        with device:  # a host would take half a minute for the random weights of Mixtral's block
            block = build(OURS, argparse.Namespace(**sizes))
        for parameter_name, parameter in block.named_parameters():
            if parameter_name.endswith(ADAPTER[1]):
                nn.init.normal_(parameter, std=0.02)
        for tokens in (8,) if small else (1, 64, 512, 4096):
            torch.manual_seed(0)
            x = torch.randn(1, tokens, sizes["hidden"], device=device, dtype=torch.bfloat16, requires_grad=True)
            functions = {TOGETHER: _step(block, x, True), ONE_BY_ONE: _step(block, x, False)}
            row: Row = {"shape": name, "tokens": tokens, **_differences(block, x, functions)}
            row["peak_bytes"] = {key: _peak(function, device) for key, function in functions.items()}
            row["device_seconds"] = seconds(functions, device, rounds=3 if small else 10)
            row["call_seconds"] = call_seconds(functions, device, rounds=2 if small else 5, calls=2 if small else 5)
            yield row


@contextmanager
def _variant(together: bool) -> Iterator[None]:
    original = vars(experts)["can_group"]
    if not together:
        vars(experts)["can_group"] = lambda *_: False
    try:
        yield
    finally:
        vars(experts)["can_group"] = original


def _step(block: nn.Module, x: Tensor, together: bool) -> Function:
    def run() -> None:
        for leaf in (x, *block.parameters()):
            leaf.grad = None
        with _variant(together):
            y = block(x)
        y.float().square().mean().backward()

    return run


def _differences(block: nn.Module, x: Tensor, functions: dict[str, Function]) -> Row:
    found: dict[str, dict[str, Tensor | None]] = {}
    for name, function in functions.items():
        function()
        found[name] = {"x": x.grad, **{key: p.grad for key, p in block.named_parameters() if p.requires_grad}}
    largest = {"x": 0.0, "lora_A": 0.0, "lora_B": 0.0}
    for name, value in found[TOGETHER].items():
        expected = found[ONE_BY_ONE][name]
        if value is None:
            continue
        if expected is None:  # an expert without rows
            expected = torch.zeros_like(value)
        difference = float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        key = name.rpartition(".")[2]
        largest[key] = max(largest[key], difference)
    return {"largest_difference": largest}


def _peak(function: Function, device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
