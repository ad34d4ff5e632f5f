"""Bytes, loss before training, time and memory of a step with embeddings in 4 bits and in 16, on the CPU.

    python -m benchmarks.embeddings [--rows 262144 --width 640 --layers 4] [--base MODEL] [--text FILE]
                                    [--steps 5] [--batch 4] [--length 512]

The model is SmolLM2-135M, or with --rows a Llama with random weights and tied embeddings of that many rows. The loss is
that of 8 windows of 512 tokens of the text (see `starts`). Each variant runs in a process of its own, and they take
turns, one step each; with --threads 1 times are of that thread alone. The lookup is of the batch's tokens. The peak is
of anonymous memory above the converted model.
"""

import argparse
import gc
import json
import math
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.deferred_logits import anonymous_mb, peak_of
from benchmarks.processes import steps_in_turns
from benchmarks.starts import load_model, load_tokenizer, perplexity, windows
from lightning_qlora import convert

WARMUP = 1
VARIANTS = {"16 bits": False, "4 bits": True}


def build(options: argparse.Namespace) -> tuple[Any, Tensor]:
    """A model in bf16, and windows of tokens."""
    if not options.rows:
        return load_model(options.base, torch.bfloat16), windows(options.text, 8, load_tokenizer(options.base))
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.width, num_hidden_layers=options.layers, intermediate_size=4 * options.width,
        num_attention_heads=options.width // 64, vocab_size=options.rows, tie_word_embeddings=True, use_cache=False,
        dtype=torch.bfloat16,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config)
    return model, torch.randint(0, options.rows, (8, 512), generator=torch.Generator().manual_seed(1))


def work(options: argparse.Namespace) -> None:
    """Build the variant and print what it is; then for each line read, make a step and print its time and peak."""
    torch.set_num_threads(options.threads)
    read, (model, rows) = measure.clock(), build(options)
    convert(model, r=16, lora_dropout=0.0, quantize_embeddings=VARIANTS[options.variant])
    loss = math.log(perplexity(model, rows))
    embedding, ids = model.get_input_embeddings(), rows.view(-1)[: options.batch * options.length]
    ids = ids.view(options.batch, options.length)
    lookups = []
    for _ in range(20):
        start = read()
        embedding(ids)
        lookups.append(read() - start)
    held = {id(p): p.nbytes for layer in (embedding, model.lm_head) for p in layer.parameters()}
    found = {"embedding_mb": sum(held.values()) / 1e6, "model_mb": sum(p.nbytes for p in model.parameters()) / 1e6}
    print(json.dumps(found | {"loss": loss, "lookup_ms": 1e3 * statistics.median(lookups)}), flush=True)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    gc.collect()
    before, peaks = anonymous_mb(), list[float]()
    for _ in sys.stdin:
        start = read()
        with peak_of(peaks):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(json.dumps({"seconds": read() - start, "peak_mb": peaks[-1] - before}), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("rows", 0), ("width", 640), ("layers", 4), ("steps", 5), ("threads", 2), ("batch", 4), ("length", 512),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--base")
    parser.add_argument("--text")
    parser.add_argument("--variant", choices=[*VARIANTS], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.variant:
        return work(options)
    torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else arguments
    found = steps_in_turns("benchmarks.embeddings", given, [*VARIANTS], WARMUP + options.steps, options.threads)
    rows = []
    for name, one in found.items():
        seconds = [step["seconds"] for step in one["steps"][WARMUP:]]
        peak = max(step["peak_mb"] for step in one["steps"])
        sizes = [f"{one['embedding_mb']:.1f}", f"{one['model_mb']:.1f}", f"{one['loss']:.4f}"]
        rows.append([name, *sizes, f"{one['lookup_ms']:.2f}", measure.spread(seconds), f"{peak:.0f}"])
    heads = ["embeddings", "embeddings, MB", "model, MB", "loss", "lookup, ms", "step, ms (quartiles)", "peak, MB"]
    command = f"`python -m benchmarks.embeddings {' '.join(given)}`"
    print(f"{command} on {measure.machine()}\n\n{measure.table(heads, rows)}")


if __name__ == "__main__":
    main()
