"""Quantizing one weight on the CPU: time, and memory beyond the weight itself.

    python -m benchmarks.cpu_quantize [--size 4096] [--rounds 5] [--threads 2] [--write]

Times alternate in one process; the memory of each variant comes from a process of its own.
"""

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from lightning_qlora import quantize


def _bitsandbytes(weight: Tensor) -> Any:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def _torchao(weight: Tensor) -> Any:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    return to_nf4(weight, 64, 256)


VARIANTS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "lightning_qlora": ("torch", quantize),
    "bitsandbytes": ("bitsandbytes", _bitsandbytes),
    "torchao": ("torchao", _torchao),
}


def peak_mb(variant: str, size: int) -> float:
    """How far the process's memory rises while it quantizes one bf16 weight, its result included."""
    call = VARIANTS[variant][1]
    call(torch.randn(256, 256).bfloat16())  # what is loaded or built once is not this weight's
    weight = torch.empty(size, size, dtype=torch.bfloat16).normal_()
    # The peak so far can lie above what is held now, and would hide that much: fill up to it first.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = [torch.ones(1 << 20, dtype=torch.uint8)]
    while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss <= before + 1024:
        held.append(torch.ones(1 << 20, dtype=torch.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = call(weight)
    del result
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _peak_in_own_process(variant: str, size: int, threads: int) -> float:
    command = [sys.executable, "-m", "benchmarks.cpu_quantize", "--variant", variant, "--size", str(size)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=measure.ROOT, env=environment)
    return float(done.stdout.split()[-1])


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="keep the JSON and refresh docs/benchmarks.md")
    parser.add_argument("--variant", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.variant:
        return print(peak_mb(options.variant, options.size))
    torch.set_num_threads(options.threads)
    present = [name for name, (needs, _) in VARIANTS.items() if find_spec(needs) is not None]
    print(*(f"skipped: {name} (not installed)\n" for name in VARIANTS if name not in present), end="")
    weight = torch.randn(options.size, options.size).bfloat16()
    calls = {name: (lambda call=VARIANTS[name][1]: call(weight)) for name in present}
    seconds = measure.take_turns(calls, options.rounds, warmup=1)
    memory = {name: _peak_in_own_process(name, options.size, options.threads) for name in present}
    ours = measure.median_ms(seconds["lightning_qlora"])
    rows = [
        [
            name,
            measure.spread(seconds[name]),
            f"{weight.numel() / measure.median_ms(seconds[name]) / 1e3:.0f}",
            f"{measure.median_ms(seconds[name]) / ours:.1f}",
            f"{memory[name]:.0f}",
        ]
        for name in present
    ]
    heads = [f"{options.size} x {options.size}, bf16", "ms (quartiles)", "million weights/s", "this / ours", "extra MB"]
    result = {"seconds": seconds, "extra_mb": memory, "size": options.size}
    measure.publish("cpu_quantize", result, measure.table(heads, rows), options.write)


if __name__ == "__main__":
    main()
