"""A whole training step of a small Llama on the CPU: time, and memory at its peak.

    python -m benchmarks.cpu_step [--steps 15] [--threads 2] [--r 16] [--dtype float32] [--write]

One process for each variant, so that each has a peak of its own; they take turns, one step each, so that what else the
machine does falls on all of them.
"""

import argparse
import json
import resource
import sys
from typing import Any

import torch

from benchmarks import measure, peers
from benchmarks.processes import steps_in_turns

SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408, "vocab_size": 8192}
BATCH = 4
LENGTH = 512
WARMUP = 2


def work(variant: str, threads: int, r: int, dtype: torch.dtype) -> None:
    """Build the model; then for each line read, make a step and print its seconds, its loss and the peak so far."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    read = measure.clock()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_attention_heads=8, num_key_value_heads=8, use_cache=False)
    model = peers.build(variant, LlamaForCausalLM(config).to(dtype), r).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    generator = torch.Generator().manual_seed(1)
    print(json.dumps({"trained": sum(parameter.numel() for parameter in trained)}), flush=True)
    for _ in sys.stdin:
        ids = torch.randint(0, SHAPE["vocab_size"], (BATCH, LENGTH), generator=generator)
        start = read()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = read() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": seconds, "loss": loss.item(), "peak_mb": peak}), flush=True)


def report(found: dict[str, dict[str, Any]]) -> str:
    """The table; each ratio is ours to that variant."""
    seconds = {name: [step["seconds"] for step in one["steps"][WARMUP:]] for name, one in found.items()}
    peak = {name: one["steps"][-1]["peak_mb"] for name, one in found.items()}
    ours = measure.median_ms(seconds[peers.OURS])
    rows = [
        [
            name,
            measure.spread(seconds[name]),
            f"{ours / measure.median_ms(seconds[name]):.2f}",
            f"{peak[name]:.0f}",
            f"{peak[peers.OURS] / peak[name]:.2f}",
            f"{one['steps'][-1]['loss']:.3f}",
        ]
        for name, one in found.items()
    ]
    heads = ["variant", "step, ms (quartiles)", "ours / this", "peak RSS, MB", "ours / this", "last loss"]
    return measure.table(heads, rows)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the model")
    parser.add_argument("--write", action="store_true", help="keep the JSON and refresh docs/benchmarks.md")
    parser.add_argument("--variant", choices=list(peers.VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.variant:
        return work(options.variant, options.threads, options.r, getattr(torch, options.dtype))
    torch.set_num_threads(options.threads)
    results = steps_in_turns(
        "benchmarks.cpu_step",
        ["--threads", str(options.threads), "--r", str(options.r), "--dtype", options.dtype],
        peers.installed(),
        WARMUP + options.steps,
        options.threads,
    )
    measure.publish("cpu_step", {"variants": results}, report(results), options.write)


if __name__ == "__main__":
    main()
