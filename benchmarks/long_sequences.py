"""The longest sequence that trains on a card, as `lightning-qlora plan` counts it, beside what others published.

    python -m benchmarks.long_sequences
    python -m benchmarks.long_sequences --measure [--tokens 4096 8192] [--dtype bfloat16] [--threads 2]

Llama 3.1 8B and Llama 3.3 70B with more positions than they have, r 32 on all linear layers without dropout, a batch of
one sequence. The limit is the memory of the card alone; the last column says what the host needs.

`--measure` compares the count with processes on a CPU, for Llama 3.1 8B divided by 8, with 8 blocks: the peak of
anonymous memory in the second step above that between the steps, without tiles and with them, beside PEFT +
bitsandbytes with its own checkpointing. Each figure has a process of its own.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks import measure, peers
from benchmarks.memory_by_size import llama
from benchmarks.seven_billion import memory
from lightning_qlora import convert, estimate_memory
from lightning_qlora.activations.device_memory import memory_of
from lightning_qlora.config import QLoRAConfig
from lightning_qlora.kernels import scratch
from lightning_qlora.texts import size_text
from lightning_qlora.tools.longest_sequence import longest_sequences
from lightning_qlora.tools.memory_estimate import PlannedRun, usable_bytes

# Tokens by GiB: of Hugging Face with FlashAttention 2, and of Unsloth; None: does not fit. From Unsloth's blog of
# December 2024 (unsloth.ai/blog/llama3-3) and the page "Benchmarks" of its documentation, r 32, batch 1.
PUBLISHED: dict[str, dict[int, tuple[int | None, int]]] = {
    "8B": {
        8: (None, 2972),
        12: (932, 21_848),
        16: (2551, 40_724),
        24: (5789, 78_475),
        40: (12_264, 153_977),
        48: (15_502, 191_728),
        80: (28_454, 342_733),
    },
    "70B": {48: (None, 12_106), 80: (6916, 89_389)},
}
MODELS = {"8B": llama(4096, 14_336, 32, 32), "70B": llama(8192, 28_672, 80, 64)}
POSITIONS = 1 << 22
ARGUMENTS: dict[str, Any] = {"r": 32, "lora_dropout": 0.0}
SETTINGS: dict[str, Any] = {"True": True, "offload": "offload"}  # of `--measure`; on a CPU "offload" is tiles alone
WORDS = 8192  # of the small model
WEIGHTS = ("4-bit weights", "other frozen weights", "trained weights", "optimizer state")
# Else glibc keeps memory that torch has freed.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "BITSANDBYTES_NOWELCOME": "1"}


def longest_table() -> str:
    rows = []
    for name, published in PUBLISHED.items():
        config = MODELS[name]
        config.max_position_embeddings = POSITIONS
        run = PlannedRun(config, "adamw", QLoRAConfig(**ARGUMENTS))
        for size, (hugging_face, unsloth) in published.items():
            recomputed, _, offloaded = longest_sequences(run, 1, usable_bytes(size << 30))
            others = ["does not fit" if tokens is None else f"{tokens:,}" for tokens in (hugging_face, unsloth)]
            own = [f"{found.tokens:,}" if found.tokens else "does not fit" for found in (recomputed, offloaded)]
            rows.append([f"{size} GiB, {name}", *others, *own, size_text(offloaded.host_bytes)])
    heads = ["card, model", "Hugging Face + FA2", "Unsloth", "`True`", '`"auto"`, `"offload"`', "on the host"]
    return measure.table(heads, rows)


def work(name: str, tokens: int, dtype: str) -> None:
    """Print the planned and the measured bytes of a step beside the weights, as JSON."""
    from transformers import LlamaForCausalLM

    config = llama(512, 1792, 8, 8)
    config.update({"vocab_size": WORDS, "num_key_value_heads": 2, "max_position_embeddings": tokens})
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).to(getattr(torch, dtype)).train()
    planned = None
    if name == peers.BNB:
        model = peers.build(peers.BNB, model, ARGUMENTS["r"])
        for part in model.modules():
            if hasattr(part, "compute_dtype"):
                part.compute_dtype = getattr(torch, dtype)
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        arguments = ARGUMENTS | {"gradient_checkpointing": SETTINGS[name]}
        arguments["compute_dtype"] = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
        estimate = estimate_memory(model, 1, tokens, device="cpu", **arguments)
        planned = estimate.total - sum(estimate.parts[part] for part in WEIGHTS)
        convert(model, **arguments)
    ids = torch.arange(tokens)[None] % WORDS
    for length in (256, tokens):
        scratch.release()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        memory_of(torch.device("cpu"), begins=True)
        before = memory("RssAnon")
        model(input_ids=ids[:, :length], labels=ids[:, :length]).loss.backward()
        peak = memory("VmHWM") - memory("RssFile")
        model.zero_grad()
    print(json.dumps({"planned": planned, "measured": 1e9 * (peak - before)}))


def measured_table(lengths: list[int], dtype: str, threads: int) -> str:
    rows = []
    names = [*SETTINGS, peers.BNB] if peers.why_missing("peft", "bitsandbytes") is None else [*SETTINGS]
    for tokens in lengths:
        row = [f"{tokens:,}"]
        for name in names:
            command = [sys.executable, "-m", "benchmarks.long_sequences", "--dtype", dtype, "--threads", str(threads)]
            done = subprocess.run(
                [*command, "--tokens", str(tokens), "--variant", name],
                env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)},
                capture_output=True,
                text=True,
                check=True,
            )
            result = json.loads(done.stdout.splitlines()[-1])
            measured = result["measured"] / 1e6
            if result["planned"] is not None:
                planned = result["planned"] / 1e6
                row += [f"{planned:,.0f}", f"{measured:,.0f} ({measured / planned - 1:+.1%})"]
            else:
                row.append(f"{measured:,.0f}")
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    heads = ["tokens"]
    for name in SETTINGS:
        heads += [f"`{name}`: planned, MB", "measured"]
    return measure.table([*heads, *names[len(SETTINGS) :]], rows)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="compare the count with processes")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16_384, 32_768])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variant", choices=[*SETTINGS, peers.BNB], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.variant:
        torch.set_num_threads(options.threads)
        return work(options.variant, options.tokens[0], options.dtype)
    if options.measure:
        print(measured_table(options.tokens, options.dtype, options.threads))
    else:
        print(longest_table())


if __name__ == "__main__":
    main()
