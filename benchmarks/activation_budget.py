"""Time and memory of a training step by how many blocks keep their activations, beside PEFT + bitsandbytes.

    python -m benchmarks.activation_budget [--rounds 4] [--threads 1]

A Llama with random weights in bf16, rank 16, one batch of 1,024 tokens. `gradient_checkpointing` is True, a limit that
a quarter, half and three quarters of what the blocks keep fit in, as `plan` counts it, or False. PEFT + bitsandbytes
has its own checkpointing, on and off. One process for each variant; they take turns, one step each. Memory is anonymous
memory (RssAnon) at the peak of a step.
"""

import argparse
import json
import statistics
import sys
from typing import Any

import torch
from torch import nn

from benchmarks import measure, peers
from benchmarks.processes import steps_in_turns
from benchmarks.seven_billion import measured
from lightning_qlora import convert, estimate_memory
from lightning_qlora.activations.activation_budget import MARGIN
from lightning_qlora.tools.memory_estimate import LIBRARIES

SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 8000}
LAYERS, TOKENS, RANK = 12, 1024, 16
ARGUMENTS: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "lora_dropout": 0.0}
SHARES = {"a limit for 1/4": 0.25, "a limit for 1/2": 0.5, "a limit for 3/4": 0.75}
PEFT = {f"{peers.BNB}, {value}": value == "checkpointing" for value in ("checkpointing", "no checkpointing")}
VARIANTS = ("True", *SHARES, "auto", "False", *PEFT)


def model() -> nn.Module:
    """The same random model each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=LAYERS, use_cache=False)
    return LlamaForCausalLM(config).bfloat16().train()


def limits() -> dict[str, int]:
    """Bytes of a process in which these shares of what the blocks keep fit, as `plan` counts them."""
    of_all: dict[str, Any] = {"batch_size": 1, "sequence_length": TOKENS, "device": "cpu", **ARGUMENTS}
    least, most = (estimate_memory(model(), **of_all, gradient_checkpointing=how) for how in (True, 2**45))
    needed = least.total + LIBRARIES
    return {name: int((needed + share * most.kept_bytes) / (1 - MARGIN)) for name, share in SHARES.items()}


def work(name: str, limits: dict[str, int]) -> None:
    """Make a step for each line read; print its figures."""
    module = model()
    budget = None
    if name in PEFT:
        module = peers.build(peers.BNB, module, RANK)
        if PEFT[name]:
            module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    else:
        setting = {"True": True, "False": False, "auto": "auto", **limits}[name]
        budget = convert(module, **ARGUMENTS, gradient_checkpointing=setting).activations
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    tokens = torch.arange(TOKENS)[None]
    print(json.dumps({}), flush=True)
    for _ in sys.stdin:
        with measured() as result:
            optimizer.zero_grad()
            module(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        print(json.dumps({**result, "kept": getattr(budget, "kept_blocks", None)}), flush=True)


def report(results: dict[str, dict[str, Any]]) -> str:
    """The table, of the steps after the first two, which measure and decide."""
    steps = {name: result["steps"][2:] for name, result in results.items()}
    rows = []
    for name, taken in steps.items():
        pairs = zip(taken, steps["True"], strict=True)
        ratios = [own["processor_seconds"] / full["processor_seconds"] for own, full in pairs]
        kept = taken[-1]["kept"]
        peak = max(step["anonymous"] for step in taken)
        rows.append([name, f"{statistics.median(ratios):.2f}", f"{peak:.2f}", "-" if kept is None else str(kept)])
    heads = ["gradient_checkpointing", "processor time of a step by that with True", "memory, GB", f"kept, of {LAYERS}"]
    return measure.table(heads, rows)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limits", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.variant:
        return work(options.variant, options.limits)
    variants = VARIANTS if peers.why_missing("peft", "bitsandbytes") is None else VARIANTS[: -len(PEFT)]
    arguments = ["--limits", json.dumps(limits())]
    results = steps_in_turns("benchmarks.activation_budget", arguments, variants, 2 + options.rounds, options.threads)
    measure.publish("activation_budget", results, report(results), write=False)


if __name__ == "__main__":
    main()
