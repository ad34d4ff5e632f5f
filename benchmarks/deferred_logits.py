"""Peak memory and time of a training step with deferred logits and with real ones, on the CPU.

    python -m benchmarks.deferred_logits [--head_only] [--steps 5] [--batch 4] [--length 512] [--layers 30]

The model has the shape of SmolLM2-135M and random weights in bf16; half of the labels are ignored, as the prompt of a
chat. The peer is PEFT + bitsandbytes, if it is installed. --head_only measures the output embedding and its loss alone,
without ignored labels. Each variant runs in a process of its own, and they take turns, one step each. The peak is of
anonymous memory above that of the converted model. Beside it stands what `estimate_memory` counts for the same step.
"""

import argparse
import gc
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import measure, peers
from benchmarks.processes import steps_in_turns
from lightning_qlora import convert, estimate_memory
from lightning_qlora.logits.deferred_head import defer_logits

VOCABULARY = 49_152
WIDTH = 576
WARMUP = 1
VARIANTS: dict[str, bool] = {"real logits": False, "deferred logits": True}
R = 16
WEIGHTS = ("4-bit weights", "other frozen weights", "trained weights")


def anonymous_mb() -> float:
    """Anonymous memory of this process, in MB of 10^6 bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


@contextmanager
def peak_of(found: list[float]) -> Iterator[None]:
    """Append the peak of the memory within this, read every 2 ms."""
    peak = [anonymous_mb()]
    running = threading.Event()

    def watch() -> None:
        while not running.wait(0.002):
            peak[0] = max(peak[0], anonymous_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        running.set()
        thread.join()
        found.append(peak[0])


def whole_model(options: argparse.Namespace) -> tuple[Callable[[], float], float]:
    """A step of the model, which returns the loss, and the planner's estimate of its memory above the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=options.layers,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    planned_mb = float("nan")
    module: nn.Module = model
    if options.variant in VARIANTS:
        arguments = {"r": R, "lora_alpha": 2 * R, "lora_dropout": 0.0, "deferred_logits": VARIANTS[options.variant]}
        planned = estimate_memory(model, options.batch, options.length, **arguments)
        planned_mb = (planned.total - sum(planned.parts[part] for part in WEIGHTS)) / 1e6
        convert(model, **arguments)
    else:
        module = peers.build(options.variant, model, R)
    module.train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    ids = torch.randint(0, VOCABULARY, (options.batch, options.length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : options.length // 2] = -100

    def step() -> float:
        loss = module(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step, planned_mb


def head_alone(options: argparse.Namespace) -> tuple[Callable[[], float], float]:
    """A step of the output embedding and its loss, as transformers computes it."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    if VARIANTS[options.variant]:
        defer_logits(head)
    rows = options.batch * options.length
    hidden = torch.randn(rows, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, VOCABULARY, (rows,))

    def step() -> float:
        hidden.grad = None
        loss = F.cross_entropy(head(hidden).float().view(-1, VOCABULARY), target)
        loss.backward()
        return float(loss.item())

    return step, float("nan")


def work(options: argparse.Namespace) -> None:
    """Build the variant; then for each line read, make a step and print its seconds, loss and peak."""
    torch.set_num_threads(options.threads)
    step, planned = (head_alone if options.head_only else whole_model)(options)
    gc.collect()
    before = anonymous_mb()
    peaks = list[float]()
    print(json.dumps({"planned_mb": planned}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        with peak_of(peaks):
            loss = step()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "loss": loss, "peak_mb": peaks[-1] - before}), flush=True)


def report(found: dict[str, dict[str, Any]]) -> str:
    """The table; ratios are to real logits."""
    seconds = {name: [step["seconds"] for step in one["steps"][WARMUP:]] for name, one in found.items()}
    peak = {name: max(step["peak_mb"] for step in one["steps"]) for name, one in found.items()}
    first = next(iter(found))
    rows = []
    for name, one in found.items():
        slower = measure.median_ms(seconds[name]) / measure.median_ms(seconds[first])
        memory = [f"{peak[name]:.0f}", f"{peak[name] / peak[first]:.2f}", f"{one['planned_mb']:.0f}"]
        rows.append([name, *memory, measure.spread(seconds[name]), f"{slower:.2f}", f"{one['steps'][-1]['loss']:.4f}"])
    heads = ["variant", "peak above the model, MB", "ratio", "planned", "step, ms (quartiles)", "ratio", "last loss"]
    return measure.table(heads, rows)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 5), ("threads", 2), ("batch", 4), ("length", 512), ("layers", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--head_only", action="store_true")
    parser.add_argument("--variant", choices=[*VARIANTS, peers.BNB], help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.variant:
        return work(options)
    torch.set_num_threads(options.threads)
    given = sys.argv[1:] if arguments is None else arguments
    variants = [*VARIANTS]
    if not options.head_only and peers.BNB in peers.installed():
        variants.append(peers.BNB)
    results = steps_in_turns("benchmarks.deferred_logits", given, variants, WARMUP + options.steps, options.threads)
    print(f"`python -m benchmarks.deferred_logits {' '.join(given)}` on {measure.machine()}\n\n{report(results)}")


if __name__ == "__main__":
    main()
