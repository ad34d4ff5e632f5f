"""Time of a step by how many blocks keep their activations; alternated, medians of ratios.

OMP_NUM_THREADS=1 python -m benchmarks.activation_budget [ROUNDS]
"""

import statistics
import sys
import time

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_qlora import convert
from lightning_qlora.training import activation_budget
from lightning_qlora.training.activation_budget import MARGIN, Memory
from lightning_qlora.training.gradient_checkpointing import budget_of

SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "vocab_size": 8000}
LAYERS, TOKENS = 8, 512


def model() -> nn.Module:
    """The same random model each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=LAYERS, use_cache=False)).train()


def ours(setting: bool | int) -> nn.Module:
    """The model with 4-bit layers."""
    module = model()
    convert(module, r=16, lora_dropout=0.0, gradient_checkpointing=setting)
    return module


def step(module: nn.Module) -> float:
    """Seconds of a forward and a backward pass."""
    tokens = torch.arange(TOKENS)[None]
    module.zero_grad()
    begin = time.perf_counter()
    module(input_ids=tokens, labels=tokens).loss.backward()
    return time.perf_counter() - begin


def main(rounds: int) -> None:
    """Print a table."""
    activation_budget.memory_of = lambda _: Memory(0, 0, 10**12)  # a device that nothing else uses
    measured = ours(10**12)
    step(measured)
    step(measured)
    budget = budget_of(measured.modules())
    assert budget is not None
    size = budget.kept_bytes / budget.kept_blocks
    modules: dict[str, nn.Module] = {"True": ours(True)}
    for kept in (LAYERS // 4, LAYERS // 2, 3 * LAYERS // 4):
        modules[f"a limit for {kept} of {LAYERS} blocks"] = ours(int((kept + 0.5) * size / (1 - MARGIN)))
    modules["auto, all fit"] = measured
    modules["False"] = ours(False)
    for module in modules.values():
        step(module)
        step(module)
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(rounds):
        for name, module in modules.items():
            seconds[name].append(step(module))
    print(f"{LAYERS} layers of {SHAPE['hidden_size']}, {TOKENS} tokens, fp32; a block keeps {size / 1e6:.1f} MB")
    print("| gradient_checkpointing | time of a step by that with True | kept activations (MB) |")
    print("| --- | --- | --- |")
    for name, taken in seconds.items():
        ratio = statistics.median(own / full for own, full in zip(taken, seconds["True"], strict=True))
        of_module = budget_of(modules[name].modules())
        kept_text = "-" if of_module is None else f"{of_module.kept_bytes / 1e6:.0f}"
        print(f"| {name} | {ratio:.2f} | {kept_text} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
