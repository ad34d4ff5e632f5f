"""A Qwen3-MoE layer on the CPU: forward and backward, ours in 4 bits against PEFT's target_parameters on bf16.

    python -m benchmarks.experts [--hidden 2048] [--width 768] [--experts 64] [--active 8] [--tokens 512] [--rounds 5]

Both have adapters of rank 8 on gate_up_proj and down_proj of every expert, without dropout (PEFT allows none). The
calls take turns in one process. Memory is the peak of one step, weights included, each in a process of its own. It
includes up to 200 MB of oneDNN, which keeps compiled code for every number of rows (ONEDNN_PRIMITIVE_CACHE_CAPACITY).
"""

import argparse
import ctypes
import gc
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure

PEFT, OURS = "PEFT target_parameters, bf16", "lightning_qlora, NF4"
RANK = 8


def block(arguments: argparse.Namespace) -> nn.Module:
    """The sparse block of Qwen3-MoE in bf16."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config: Any = Qwen3MoeConfig(
        hidden_size=arguments.hidden, moe_intermediate_size=arguments.width, num_experts=arguments.experts,
        num_experts_per_tok=arguments.active,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    block = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def build(name: str, arguments: argparse.Namespace) -> nn.Module:
    """The block with adapters."""
    model = nn.Sequential(block(arguments))
    if name == OURS:
        from lightning_qlora import convert

        convert(model, r=RANK, lora_dropout=0.0)
        return model.train()
    from peft import LoraConfig, get_peft_model

    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=RANK, target_modules=[], target_parameters=names, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config).train()  # type: ignore[arg-type]


def step(model: nn.Module, arguments: argparse.Namespace) -> Callable[[], None]:
    """Forward, backward, and gradients set to None."""
    x = torch.randn(1, arguments.tokens, arguments.hidden, dtype=torch.bfloat16, requires_grad=True)

    def call() -> None:
        model(x).float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    return call


def peak_mb(name: str, arguments: argparse.Namespace) -> float:
    """Peak of the resident memory of a step, minus what the process had before the block was built (Linux)."""
    small = argparse.Namespace(**{**vars(arguments), "hidden": 64, "width": 64, "experts": 8, "tokens": 8})
    step(build(name, small), small)()  # imports and thread pools
    before = _status("VmRSS")
    call = step(build(name, arguments), arguments)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory of the conversion
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    call()
    call()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def main() -> None:
    """Time both in turns, and run one process for the memory of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 2048, "width": 768, "experts": 64, "active": 8, "tokens": 512, "rounds": 5, "threads": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(peak_mb(arguments.peak, arguments))
        return
    seconds = measure.take_turns(
        {name: step(build(name, arguments), arguments) for name in (PEFT, OURS)}, arguments.rounds, warmup=1
    )
    rows = []
    for name, taken in seconds.items():
        command = [sys.executable, "-m", "benchmarks.experts", *sys.argv[1:], "--peak", name]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        rows.append([name, measure.spread(taken), f"{peak:.0f}"])
    print(f"{measure.machine()}; {vars(arguments)}\n")
    print(measure.table(["", "ms per step, median (quartiles)", "peak MB"], rows))


if __name__ == "__main__":
    main()
