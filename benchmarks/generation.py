"""Tokens a second of `generate` on a CPU, one prompt: ours, PEFT + bitsandbytes, and the model in 16 bits.

    python -m benchmarks.generation [--rounds 15] [--tokens 24] [--threads 1] [--r 16] [--base FOLDER] [--write]

Each variant has its own model. All are in one process and take turns. With one thread the time is CPU time.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import measure, peers
from lightning_qlora import disable_adapter

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from smollm2 import load_model

PROMPT = 16  # tokens
BNB = "bitsandbytes"
OURS_ALONE = f"{peers.OURS}, adapter disabled"
DENSE = "16 bits"


def generate(model: nn.Module, tokens: int) -> Tensor:
    """Generate that many tokens, the most likely ones."""
    prompt = torch.arange(100, 100 + PROMPT).unsqueeze(0)
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return model.generate(  # type: ignore[operator, no-any-return]
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **lengths
    )


def variants(base: str | None, r: int, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Name -> a call that generates."""

    dense = load_model(base, torch.bfloat16)
    models = {peers.OURS: peers.build(peers.OURS, copy.deepcopy(dense), r), DENSE: dense}
    if not peers.why_missing("bitsandbytes", "peft"):
        models[peers.BNB] = peers.build(peers.BNB, copy.deepcopy(dense), r)
        models[BNB] = peers.with_bnb(copy.deepcopy(dense))
    calls = {name: partial(generate, model.eval(), tokens) for name, model in models.items()}

    def without_adapter() -> Tensor:
        with disable_adapter(models[peers.OURS]):
            return generate(models[peers.OURS], tokens)

    return {**calls, OURS_ALONE: without_adapter}


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--base", help="hub name or folder of a model; without it SmolLM2-135M from PyPI")
    parser.add_argument("--write", action="store_true", help="keep the JSON and refresh docs/benchmarks.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    seconds = measure.take_turns(variants(options.base, options.r, options.tokens), options.rounds)
    rows = []
    for name, taken in seconds.items():
        of_token = [each / options.tokens for each in taken]
        rows.append([name, f"{1 / statistics.median(of_token):.1f}", measure.spread(of_token)])
    name = "SmolLM2-135M" if options.base is None else options.base
    text = measure.table([f"{name}, one prompt", "tokens/s", "ms a token (quartiles)"], rows)
    text += "\n\nMedians of the ratios of a round:\n"
    for ours, other in [(peers.OURS, peers.BNB), (OURS_ALONE, BNB), (OURS_ALONE, DENSE)]:
        if other in seconds:
            ratio = statistics.median(b / a for a, b in zip(seconds[ours], seconds[other], strict=True))
            text += f"\n- {ours}: {ratio:.2f} times the tokens a second of {other}"
    measure.publish("generation", {"seconds": seconds}, text, options.write)


if __name__ == "__main__":
    main()
